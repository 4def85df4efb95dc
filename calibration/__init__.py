"""Calibration of recipes and drift thresholds on prompts, synthetic tasks, and statistics of answers to tasks."""

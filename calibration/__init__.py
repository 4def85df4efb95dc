"""Recipes from prompts, and quality reports."""

"""Checkpoints of any format, behind one protocol."""

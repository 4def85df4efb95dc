"""The custom ops: one folder per op."""

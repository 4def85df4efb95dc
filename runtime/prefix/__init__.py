"""Prefix reuse: prompts that begin like an earlier one continue from what it had cached.

docs/decisions/0063-prefix-reuse.md
"""

"""Sequences and their pages: who owns which, how many, and the slot that the next token takes."""

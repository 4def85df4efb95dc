"""Backends that run steps. Each has ``load`` and ``executor`` (steps); some have ``store`` (cache memory) and ``recall/``."""

"""The report's part on policies whose whole cache stays on the host."""

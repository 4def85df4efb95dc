"""The whole way, for Python callers and for the command line: checkpoint, calibration, engine, evaluation."""

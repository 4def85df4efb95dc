"""The parts of an engine other than its graphs, for each target."""

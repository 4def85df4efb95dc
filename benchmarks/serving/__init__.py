"""Many requests at once: gain and cost of continuous batching (the scheduler and the engine core)."""

"""Many requests at once: what the scheduler and the core that runs its steps are worth, and what they cost."""

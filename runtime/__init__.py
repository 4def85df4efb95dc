"""Engine folder to tokens."""

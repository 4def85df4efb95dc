"""Recall that the GPU drives by itself: the cache in pinned memory of the host, working sets on the device."""

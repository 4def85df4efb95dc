"""NVIDIA's kvpress compared with our policies by the tokens that each keeps. See docs/kvpress.md."""

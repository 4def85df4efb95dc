"""NVIDIA's kvpress beside our policies: fetched, run, and compared by what each keeps. See docs/kvpress.md."""

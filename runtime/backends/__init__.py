"""Where steps run. A backend is a folder: ``load``, ``store`` (memory of the cache), ``executor`` (steps), ``recall/``."""

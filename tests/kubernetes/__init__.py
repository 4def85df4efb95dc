"""JSON schemas of Kubernetes and KServe, for the files in ``examples/serving``: see ``schemas.py``."""

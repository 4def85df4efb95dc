"""The dense layers of an engine with packed weights in kernels of our own, which read the weights where they are mapped."""

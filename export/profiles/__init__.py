"""Sizes that TensorRT engines are built for, as data: copy one of these files, change it, and give its path as PROFILE."""

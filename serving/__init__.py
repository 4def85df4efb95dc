"""Servers: front doors of one ``AsyncEngine``.

``metrics``, ``logs`` and ``admission`` know nothing of a protocol; ``http`` speaks that of OpenAI, and
``triton`` makes an engine a model of NVIDIA's Triton Inference Server.
"""

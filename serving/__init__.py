"""Servers: front doors of one ``AsyncEngine``.

``metrics``, ``logs`` and ``admission`` know nothing of a protocol; ``http`` speaks that of OpenAI.
"""

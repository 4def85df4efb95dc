"""The KV cache on the host: tiers, working sets, and pages that are recalled while the model computes.

``StreamedRecall`` runs RecallAttention with the same results as its kernel in ``plugins``, whenever pages are copied.
"""

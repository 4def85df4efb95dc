"""Random Attention (arXiv 2609.03430): long generation in bounded memory. The prompt stays, generated tokens are forgotten at
random, by the page and in all KV heads of a layer together.

A fact that was generated once and is needed much later is lost: docs/decisions/0073-random-blocks.md.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="randomdecode",
    summary="the whole prompt, and of the generated tokens 1024, from which pages are drawn at random and freed",
    decode="draw",
    draw_tokens=1024,
)

"""Decode "draw": whole pages of generated tokens are drawn at random and freed, the prompt never is.

Random Attention (arXiv 2609.03430) draws tokens for each KV head. Its ablations found draws that all heads share, and draws of
blocks of up to 64 tokens, as good; with both, a draw is a page that the pool gets back, and no cached token moves.
docs/decisions/0073-random-blocks.md
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trt_kv.plugins.kv_rows import KvDtype, load
from trt_kv.plugins.lots import LOTS, key_of, lot_of
from trt_kv.plugins.paging import Floats
from trt_kv.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Draws:
    """``tokens``: generated tokens that stay in each layer after a draw; at least two pages of them do. ``extreme``: share of
    the pages that are not drawn because they hold the widest values (VaSE, arXiv 2606.03928), in [0, 1).
    """

    tokens: int
    extreme: float = 0.0
    seed: int = 0

    def most(self, page_size: int) -> int:
        """Generated tokens of a layer at which one of its pages is drawn: the most that it ever holds."""
        return max(self.tokens, 2 * page_size) + page_size

    def page(self, ranges_XK: Floats | None, n_pages: int, *, layer: int, n_seen: int) -> int:
        """Which of ``n_pages`` pages is freed when a layer draws after ``n_seen`` tokens of a sequence.

        ``ranges_XK``: the widest value of each page and KV head, of ``page_ranges``; None without ``extreme``.
        """
        drawn = np.arange(n_pages)
        if ranges_XK is not None:
            means_K = np.maximum(ranges_XK.mean(axis=0), np.finfo(np.float32).tiny)
            order_X = np.argsort((ranges_XK / means_K).max(axis=1), kind="stable")
            drawn = np.sort(order_X[: n_pages - min(int(self.extreme * n_pages), n_pages - 1)])
        return int(drawn[len(drawn) * lot_of(key_of(self.seed, layer, 0), n_seen) // LOTS])


def draws_of(policy: Policy) -> Draws | None:
    """How a policy draws; None if it does not."""
    return Draws(tokens=policy.draw_tokens, extreme=policy.draw_extreme, seed=policy.seed) if policy.draws else None


def most_generated(policy: Policy, page_size: int) -> int | None:
    """Generated tokens that a layer ever holds; None: all of them."""
    draws = draws_of(policy)
    return None if draws is None else draws.most(page_size)


def page_ranges(pages: Sequence[int], v_XKPW: np.ndarray, kv_dtype: str) -> Mapping[int, Floats]:
    """For each page, [K]: the largest difference between two elements of one value, over the page's tokens; ``v_XKPW`` as
    ``KvPool.read_pages`` returns them.
    """
    stored_XKPW = np.ascontiguousarray(v_XKPW).view(KvDtype(kv_dtype).stored_as)
    ranges_XK = np.ptp(load(stored_XKPW), axis=3).max(axis=2)
    return dict(zip(pages, ranges_XK, strict=True))

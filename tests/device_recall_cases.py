"""Worlds in which device-driven recall is compared with RecallAttention over the whole cache."""

from dataclasses import dataclass

import numpy as np

from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.program import OpNode, Program


@dataclass(frozen=True, kw_only=True)
class Case:
    """``placement``: when side work is done (see ``side_of``). ``n_table``: columns of page tables, which plan attention.
    ``cut``: prompt tokens that never come.
    """

    name: str
    placement: str = "at_once"
    tau: float = 0.5
    page_size: int = 4
    heads: tuple[int, int, int] = (6, 2, 10)
    """H, K, D."""
    n_layers: int = 1
    sinks: int = 3
    recent: int = 5
    kept_tokens: int = 36
    kept_share: float = 0.0
    summary: int = 0
    pooling: int = 0
    steadiness: float = 0.7
    chunk: int = 32
    prompt_block: int = 4096
    n_table: int = 24
    dtype: str = "float32"
    prompts: tuple[int, ...] = (51, 6)
    cut: int = 0
    seed: int = 0
    n_steps: int = 4

    @property
    def limits(self) -> PageLimits:
        return PageLimits(page_size=self.page_size, sinks=self.sinks, recent=self.recent)

    @property
    def program(self) -> Program:
        names = ("page_size", "sinks", "recent", "kept_tokens", "kept_share", "tau", "summary", "pooling")
        common = {name: getattr(self, name) for name in names} | {"scale": self.heads[2] ** -0.5}
        return tuple((OpNode(op="RecallAttention", attributes={**common, "layer": layer}),) for layer in range(self.n_layers))

    def n_chosen(self, prompt_len: int, n_tokens: int) -> int:
        dropped = round((1 - np.float64(np.float32(self.kept_share))) * prompt_len)
        room = self.limits.n_chosen(self.kept_tokens + prompt_len - int(dropped))
        return min(room, len(self.limits.choosable(n_tokens)))


CASES = (
    Case(name="never_corrected", tau=-1.01, steadiness=0.0, prompts=(79, 6)),
    Case(name="prompts_without_end", tau=-1.01, cut=1, n_steps=3),
    Case(name="corrected_at_times"),
    Case(name="always_corrected", tau=1.01),
    Case(name="at_the_last_moment", placement="last_moment", n_layers=2, prompts=(38, 6)),
    Case(name="by_chance", placement="random", page_size=3, seed=1, summary=1, pooling=3),
    Case(name="pages_become_choosable", page_size=2, kept_tokens=28, prompts=(31,), n_steps=6, seed=1, tau=0.6),
    Case(name="codes", placement="random", page_size=3, seed=2, summary=2, pooling=3, n_layers=2, prompts=(40, 6)),
    Case(name="share", placement="after_attention", kept_tokens=4, kept_share=0.55, page_size=5, heads=(4, 1, 7), pooling=2),
)
SLOW_CASES = (
    *(
        Case(name=f"{placement}_{tau}", placement=placement, tau=tau, n_layers=2, seed=seed, n_steps=10)
        for seed, placement in enumerate(("at_once", "after_attention", "last_moment", "random"))
        for tau in (-1.01, 0.5, 0.8)
    ),
    Case(name="one_token_pages", page_size=1, kept_tokens=19, sinks=0, recent=1, placement="random", pooling=1, n_table=80),
    Case(name="no_room_to_choose", kept_tokens=8),
    Case(name="more_room_than_pages", kept_tokens=400, placement="last_moment"),
    Case(
        name="codes_in_half", dtype="float16", page_size=10, summary=2, placement="last_moment", kept_tokens=70, prompts=(95, 6)
    ),
    Case(name="half", dtype="float16", page_size=7, placement="after_attention"),
    Case(name="in_parts", n_table=160, prompts=(90, 300), kept_tokens=200, chunk=150, heads=(2, 1, 6), placement="random"),
    Case(name="three", prompts=(51, 6, 38), heads=(6, 3, 10), n_steps=12, placement="random", seed=4),
)
BLOCKWISE = Case(name="blockwise", prompt_block=16, prompts=(43,), chunk=20, n_steps=2)
"""A prompt whose earlier pages do not fit into the staging area: equal but for rounding."""

"""Recall of one layer for its next step, in three parts that overlap with the running step and are joined at its end."""

from torch import Tensor

from trt_kv.plugins.recall_attention.choice_triton import choose_pages
from trt_kv.runtime.backends.cuda.recall.begin import BegunLayer, LayerStep
from trt_kv.runtime.backends.cuda.recall.moves import Moves, WorkingSets, plan_ahead
from trt_kv.runtime.backends.cuda.recall.recall_pages import AHEAD_PROGRAMS, recall_pages


class RecallAhead:
    """Recall for a layer's next step, with this step's queries. Submit its methods in the order of their definition."""

    def __init__(self, sets: WorkingSets, step: LayerStep, begun: BegunLayer) -> None:
        self._sets, self._step, self._begun = sets, step, begun
        self._wanted_BKT: Tensor | None = None
        self._moves: Moves | None = None

    def choose(self) -> None:
        """Choose pages, once queries and summaries are written. Reads nothing that changes before the next step begins."""
        begun, step = self._begun, self._step
        self._wanted_BKT = choose_pages(
            begun.latest_BHD,
            self._sets.summaries,
            step.table_BT,
            begun.ahead.between,
            begun.wanted_ahead_BK,
            step.limits.n_sinks,
            step.args.pooling,
            step.args.softmax_scale,
        )

    def plan_and_fill(self) -> None:
        """Plan copies, and fill slots that the running step does not read, once that step's own recall has been planned."""
        begun, step, sets = self._begun, self._step, self._sets
        assert self._wanted_BKT is not None
        self._moves = plan_ahead(
            sets,
            self._wanted_BKT,
            begun.wanted_ahead_BK,
            step.table_BT,
            step.kv_len_B,
            begun.ahead,
            begun.now.chosen,
            begun.blocks_B,
        )
        recall_pages(sets.host_kv, sets.kv, self._moves.rows, self._moves.unread, programs=AHEAD_PROGRAMS)

    def fill_read(self) -> None:
        """Fill the slots that the running step reads, once its attention is done."""
        assert self._moves is not None
        sets = self._sets
        recall_pages(sets.host_kv, sets.kv, self._moves.rows, self._moves.read, programs=AHEAD_PROGRAMS)

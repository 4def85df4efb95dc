"""What one layer does for the next step beside the running one, in three parts that nothing waits for before the step ends."""

from torch import Tensor

from trt_kv.plugins.recall_attention.choice_triton import choose_pages
from trt_kv.runtime.backends.cuda.recall.begin import BegunLayer, LayerStep
from trt_kv.runtime.backends.cuda.recall.moves import Moves, WorkingSets, plan_ahead
from trt_kv.runtime.backends.cuda.recall.recall_pages import AHEAD_PROGRAMS, recall_pages


class RecallAhead:
    """Recall for a layer's next step, with this step's queries; its parts are submitted in the order of its methods."""

    def __init__(self, sets: WorkingSets, step: LayerStep, begun: BegunLayer) -> None:
        self._sets, self._step, self._begun = sets, step, begun
        self._wanted_BKT: Tensor | None = None
        self._moves: Moves | None = None

    def choose(self) -> None:
        """When queries and summaries are there. Reads nothing that is changed before the next step begins."""
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
        """When the running step has its table, and what it needs at once is planned: fill slots that it does not read."""
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
        """When the running step has attended: fill the slots that it read."""
        assert self._moves is not None
        sets = self._sets
        recall_pages(sets.host_kv, sets.kv, self._moves.rows, self._moves.read, programs=AHEAD_PROGRAMS)

"""Greedy continuation of a prompt by a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trt_kv.runtime.model_runner import ModelRunner


def continue_greedily(runner: "ModelRunner", token_ids: Sequence[int], n_steps: int, end_ids: Sequence[int]) -> Sequence[int]:
    """Prefill ``token_ids`` and then run ``n_steps`` greedy decode steps, fewer if one of ``end_ids`` is generated.

    Returns the tokens that were fed in these steps.
    """
    from trt_kv.runtime.engine_core import EngineCore
    from trt_kv.runtime.request import Request
    from trt_kv.runtime.reservation import Reservation
    from trt_kv.runtime.sampling import SamplingParams

    # The last token is not fed, so there is one token more than steps.
    request = Request(prompt_ids=token_ids, params=SamplingParams(), tokenizer=None, eos_token_ids=end_ids, limit=n_steps + 1)
    core = EngineCore(runner, Reservation([]))
    core.add([request])
    core.run_until_idle()
    if request.error is not None:
        raise request.error
    return request.token_ids[:-1]

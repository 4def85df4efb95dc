"""A model continues a prompt with its own likeliest tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trt_kv.runtime.model_runner import ModelRunner


def continue_greedily(runner: "ModelRunner", token_ids: Sequence[int], n_steps: int, end_ids: Sequence[int]) -> None:
    """Run ``token_ids`` and then ``n_steps`` steps of the likeliest token, fewer where one of ``end_ids`` comes first."""
    from trt_kv.runtime.engine_core import EngineCore
    from trt_kv.runtime.request import Request
    from trt_kv.runtime.reservation import Reservation
    from trt_kv.runtime.sampling import SamplingParams

    # The token that is chosen last is not fed: one more than steps.
    request = Request(prompt_ids=token_ids, params=SamplingParams(), tokenizer=None, eos_token_ids=end_ids, limit=n_steps + 1)
    core = EngineCore(runner, Reservation([]))
    core.add([request])
    core.run_until_idle()
    if request.error is not None:
        raise request.error

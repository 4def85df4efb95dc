"""The tensors of the Triton model: those that clients of TensorRT-LLM and of vLLM on Triton send and read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ANY = -1
"""The size of a list."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """``dtype``: Triton's name of the type. ``size``: 1 or ``ANY``."""

    name: str
    dtype: str
    size: int = 1


INPUTS = (
    Tensor(name="text_input", dtype="STRING"),
    Tensor(name="input_ids", dtype="INT32", size=ANY),
    Tensor(name="stream", dtype="BOOL"),
    Tensor(name="sampling_parameters", dtype="STRING"),
    Tensor(name="max_tokens", dtype="INT32"),
    Tensor(name="min_tokens", dtype="INT32"),
    Tensor(name="temperature", dtype="FP32"),
    Tensor(name="top_k", dtype="INT32"),
    Tensor(name="top_p", dtype="FP32"),
    Tensor(name="seed", dtype="UINT64"),
    Tensor(name="repetition_penalty", dtype="FP32"),
    Tensor(name="presence_penalty", dtype="FP32"),
    Tensor(name="frequency_penalty", dtype="FP32"),
    Tensor(name="stop_words", dtype="STRING", size=ANY),
    Tensor(name="bad_words", dtype="STRING", size=ANY),
    Tensor(name="end_id", dtype="INT32"),
    Tensor(name="pad_id", dtype="INT32"),
    Tensor(name="beam_width", dtype="INT32"),
    Tensor(name="length_penalty", dtype="FP32"),
    Tensor(name="exclude_input_in_output", dtype="BOOL"),
    Tensor(name="return_finish_reason", dtype="BOOL"),
    Tensor(name="return_num_input_tokens", dtype="BOOL"),
    Tensor(name="return_num_output_tokens", dtype="BOOL"),
    Tensor(name="return_cumulative_logprob", dtype="BOOL"),
    Tensor(name="return_logprobs", dtype="BOOL"),
    Tensor(name="return_log_probs", dtype="BOOL"),
    Tensor(name="return_output_ids", dtype="BOOL"),
)
"""All are optional for Triton, which checks types and shapes; the model says which one is missing."""

OUTPUTS = (
    Tensor(name="text_output", dtype="STRING", size=ANY),
    Tensor(name="output_ids", dtype="INT32", size=ANY),
    Tensor(name="finish_reason", dtype="STRING", size=ANY),
    Tensor(name="num_input_tokens", dtype="UINT32"),
    Tensor(name="num_output_tokens", dtype="UINT32", size=ANY),
    Tensor(name="cumulative_logprob", dtype="FP32", size=ANY),
    Tensor(name="logprobs", dtype="STRING", size=ANY),
)

BATCH_DIMENSION = "batch_dimension"
"""A parameter in ``config.pbtxt``: whether inputs have a leading dimension of 1, as clients of TensorRT-LLM send them ("true",
the default), or none, as those of vLLM do ("false").
"""


def complete_config(config: Any) -> Any:
    """Add inputs, outputs and the way of answering to ``config``, Triton's ``ModelConfig`` of a model that lacks them."""
    parameter = config.as_dict().get("parameters", {}).get(BATCH_DIMENSION, {"string_value": "true"})
    if parameter["string_value"] not in ("true", "false"):
        raise ValueError(f"{BATCH_DIMENSION} is {parameter['string_value']!r} in config.pbtxt, not 'true' or 'false'")
    leading = [1] if parameter["string_value"] == "true" else []
    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": True})
    for tensor in _described(INPUTS, leading):
        config.add_input(tensor | {"optional": True})
    for tensor in _described(OUTPUTS, []):
        config.add_output(tensor)
    return config


def _described(tensors: Sequence[Tensor], leading: list[int]) -> list[dict[str, Any]]:
    return [{"name": one.name, "data_type": f"TYPE_{one.dtype}", "dims": [*leading, one.size]} for one in tensors]

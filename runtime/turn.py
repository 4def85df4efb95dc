"""What one turn of a conversation asks of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from trt_kv.chat.messages import Message
from trt_kv.runtime.cache.states import SequenceState
from trt_kv.runtime.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Turn:
    """``history``: all tokens before the answer, of which ``prompt_ids`` are read now, behind ``begins_with``.
    ``messages``: all messages before the answer; none, if the conversation consists of prompts.
    """

    history: Sequence[int]
    prompt_ids: Sequence[int]
    params: SamplingParams
    messages: Sequence[Message]
    begins_with: SequenceState | None
    keeps_state: bool

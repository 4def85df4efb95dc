"""The prompts that a checkpoint is calibrated on, as token ids."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_kv.chat.encoder import ChatEncoder
from trt_kv.chat.templates import DEFAULT, ChatTemplates, chat_templates
from trt_kv.errors import CheckpointError, UsageError
from trt_kv.pipeline.callbacks import OnNote
from trt_kv.pipeline.plans import CalibrationPlan
from trt_kv.presets import is_bundled
from trt_kv.prompt_tokens import prompt_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trt_kv.calibration.prompt_files import ChatPrompt
    from trt_kv.export.checkpoints.base import Checkpoint


def calibration_source(checkpoint: "Checkpoint", plan: CalibrationPlan) -> str:
    """Where the prompts of ``plan`` come from, as recipes and thresholds of ``checkpoint`` record it."""
    as_messages = plan.prompts is None and DEFAULT in _templates_of(checkpoint).templates
    return f"{plan.source}, as messages" if as_messages else plan.source


def calibration_prompts(
    checkpoint: "Checkpoint", plan: CalibrationPlan, n_synthetic: int, *, new_tokens: int = 0, on_note: OnNote
) -> list[list[int]]:
    """Token ids of the prompts of ``plan``.

    Synthetic prompts have about ``n_synthetic`` words, or as many as leave room in the context for ``new_tokens``, at most half
    of it. For a model with a chat template each is the message of a user.
    """
    from trt_kv.calibration.prompt_files import prompts_from_file
    from trt_kv.runtime.text.tokenizer import load_tokenizer

    limit = checkpoint.config.max_positions
    encoder = _Encoder(checkpoint, load_tokenizer(checkpoint.tokenizer_file, error=CheckpointError))
    if plan.prompts is None:
        _tell_synthetic(checkpoint, encoder, on_note)
        return _synthetic_prompts(encoder, plan, n_synthetic, limit - min(new_tokens, limit // 2))
    given = prompts_from_file(plan.prompts)
    given = random.Random(plan.seed).sample(given, min(plan.samples, len(given)))
    prompts = encoder.encoded(given)
    for prompt, ids in zip(given, prompts, strict=True):
        if len(ids) > limit:
            text = prompt if isinstance(prompt, str) else prompt.messages[-1].get("content", "")
            raise UsageError(
                "a calibration prompt is longer than the model's positions",
                got=f"{len(ids)} tokens: {text[:40]!r}...",
                expected=f"at most {limit}",
                fix=f"shorten it in {plan.prompts}, or remove it",
            )
    return prompts


class _Encoder:
    """Encodes texts, and conversations with the checkpoint's chat template, to which no token is added."""

    def __init__(self, checkpoint: "Checkpoint", tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        templates = _templates_of(checkpoint)
        self._chat = ChatEncoder(tokenizer, templates)
        self.has_template = DEFAULT in templates.templates

    def encoded(self, prompts: "Sequence[str | ChatPrompt]") -> list[list[int]]:
        return [
            prompt_tokens(self._tokenizer, prompt)
            if isinstance(prompt, str)
            else self._chat.token_ids(prompt.messages, prompt.options)
            for prompt in prompts
        ]

    def synthetic(self, texts: Sequence[str]) -> list[list[int]]:
        """Each as the message of a user if there is a template for conversations."""
        from trt_kv.calibration.prompt_files import ChatPrompt

        if not self.has_template:
            return self.encoded(texts)
        return self.encoded([ChatPrompt(messages=[{"role": "user", "content": text}]) for text in texts])


def _templates_of(checkpoint: "Checkpoint") -> ChatTemplates:
    return chat_templates(checkpoint.tokenizer_files, owner=checkpoint.name, error=CheckpointError)


def _tell_synthetic(checkpoint: "Checkpoint", encoder: _Encoder, on_note: OnNote) -> None:
    if is_bundled(checkpoint.location):
        return
    english, better = "synthetic English", "prompts"
    if encoder.has_template:
        english, better = f"{english} in the model's chat template", 'conversations, {"messages": [...]},'
    on_note(f"no PROMPTS given: calibrating on trt-kv's {english}; {better} like those in production are better")


def _synthetic_prompts(encoder: _Encoder, plan: CalibrationPlan, n_words: int, limit: int) -> list[list[int]]:
    """Synthetic prompts of ``n_words`` words, or of fewer if this tokenizer makes more than ``limit`` tokens of them."""
    from trt_kv.calibration.tasks import calibration_prompts as synthetic_tasks

    n_words = min(n_words, limit)
    while True:
        try:
            tasks = synthetic_tasks(plan.samples, context_length=n_words, seed=plan.seed)
        except UsageError as cause:
            raise UsageError(
                "the model's context is too short for synthetic calibration prompts",
                got=f"{limit} tokens, room for {n_words} words",
                fix="calibrate on prompts of your own: --prompts FILE (make: PROMPTS=FILE)",
            ) from cause
        prompts = encoder.synthetic([task.prompt for task in tasks])
        longest = max(map(len, prompts))
        if longest <= limit:
            return prompts
        n_words = min(n_words - 1, n_words * limit // longest)

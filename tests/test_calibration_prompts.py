"""Synthetic calibration prompts fit into the context of the model that reads them, whatever its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from trt_kv.errors import UsageError
from trt_kv.pipeline.calibration_prompts import calibration_prompts, calibration_source
from trt_kv.pipeline.plans import CalibrationPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextOnly:
    """What calibration prompts need of a checkpoint."""

    tokenizer_file: Path
    max_positions: int
    name: str = "mine"

    @property
    def location(self) -> Path:
        return self.tokenizer_file.parent

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        return {path.name: path for path in self.location.iterdir()}

    @property
    def config(self) -> "ContextOnly":
        return self


@pytest.fixture
def of_bytes(tmp_path: Path) -> Path:
    """A tokenizer with one token per byte: about five per word."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def prompts_for(tokenizer: Path, max_positions: int, plan: CalibrationPlan, **options: Any) -> list[list[int]]:
    checkpoint: Any = ContextOnly(tokenizer_file=tokenizer, max_positions=max_positions)
    return calibration_prompts(checkpoint, plan, 1024, on_note=print, **options)


@pytest.mark.parametrize(("max_positions", "new_tokens", "most"), [(512, 0, 512), (512, 64, 448), (700, 600, 350)])
def test_synthetic_prompts_are_shortened_to_the_context(max_positions: int, new_tokens: int, most: int, of_bytes: Path) -> None:
    prompts = prompts_for(of_bytes, max_positions, CalibrationPlan(samples=4), new_tokens=new_tokens)
    assert len(prompts) == 4
    assert most // 2 < max(map(len, prompts)) <= most


def test_a_context_too_short_for_them_is_refused_with_what_helps(of_bytes: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too short for synthetic calibration prompts") as caught:
        prompts_for(of_bytes, 64, CalibrationPlan())
    assert "--prompts FILE" in str(caught.value.fix)
    (tmp_path / "mine.txt").write_text("the old man\n")
    assert len(prompts_for(of_bytes, 64, CalibrationPlan(prompts=tmp_path / "mine.txt"))[0]) == 11


def test_a_given_prompt_that_is_too_long_is_named(of_bytes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("short\n" + "long " * 20 + "\n")
    with pytest.raises(UsageError, match="'long long") as caught:
        prompts_for(of_bytes, 64, CalibrationPlan(prompts=tmp_path / "mine.txt"))
    assert "mine.txt" in str(caught.value.fix)


def test_synthetic_prompts_are_messages_for_a_model_with_a_chat_template(of_bytes: Path) -> None:
    text = prompts_for(of_bytes, 700, CalibrationPlan(samples=1))[0]
    template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<bot>"
    (of_bytes.parent / "chat_template.jinja").write_text(template)
    checkpoint: Any = ContextOnly(tokenizer_file=of_bytes, max_positions=700)
    notes: list[str] = []
    (prompt,) = calibration_prompts(checkpoint, CalibrationPlan(samples=1), 1024, on_note=notes.append)
    shown = Tokenizer.from_file(str(of_bytes)).decode(prompt).replace(" ", "")
    assert shown.startswith("<user>")
    assert shown.endswith("<bot>")
    assert len(text) <= 700
    assert len(prompt) <= 700
    assert calibration_source(checkpoint, CalibrationPlan()) == "bundled synthetic English, calibration split, as messages"
    assert "in the model's chat template; conversations" in notes[0]

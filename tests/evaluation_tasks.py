"""Tasks in the bundled tokenizer's words, for tests of evaluations."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trt_kv.calibration.answers import Answer

WORDS = "the old storm marched toward a narrow tower . alice holds red coin".split()


def write_tasks(path: Path) -> Path:
    """Five tasks in two groups, prompts of different lengths, answers of one to three words."""
    rng = np.random.default_rng(3)
    lines = [
        {
            "name": f"task {i}",
            "task": "short" if i < 2 else "long",
            "prompt": " ".join(rng.choice(WORDS, 9 if i < 2 else 20 + 7 * i)),
            "expected": " ".join(rng.choice(WORDS, 1 + i % 3)),
        }
        for i in range(5)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def timeless(answers: Sequence[Answer]) -> list[Answer]:
    """Answers without the time they took."""
    return [dataclasses.replace(answer, prompt_seconds=0.0, answer_seconds=0.0) for answer in answers]

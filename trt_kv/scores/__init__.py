"""The scores: one file each, holding one ``SCORE``. A new file here is a new name for ``--score``."""

import importlib
import pkgutil

from trt_kv.errors import UnknownNameError
from trt_kv.score import Score


def score_names() -> list[str]:
    """Every name that ``score_from_name`` accepts."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def score_from_name(name: str) -> Score:
    """The score called ``name``; ``UnknownNameError`` lists the known ones."""
    if name not in score_names():
        raise UnknownNameError("score", name, score_names())
    score: Score = importlib.import_module(f"{__name__}.{name}").SCORE
    return score


def all_scores() -> list[Score]:
    """Every score, by name."""
    return [score_from_name(name) for name in score_names()]


def attention_scores() -> list[str]:
    """The names of the scores that are computed from attention weights."""
    return [score.name for score in all_scores() if score.reads_attention]


def predicted_scores() -> list[str]:
    """The names of the scores that are predicted from keys and values."""
    return [score.name for score in all_scores() if score.predicts]


def scores_that_read(setting: str) -> list[str]:
    """The names of the scores whose ``settings`` contain this field of a policy."""
    return [score.name for score in all_scores() if setting in score.settings]

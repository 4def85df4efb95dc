"""The choice of tokens on the device: what ``runtime/sampling/choice.py`` does on the host, for all rows of a step at once.

The same filters in the same order, and the same random numbers, so the same tokens up to the rounding of exponentials. Nothing
here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trt_kv.runtime.backends.step import Choice

_COLDEST = 1e-30
"""As on the host: below it, a temperature has no fp32 reciprocal."""
_ELEMENTS = 2**20
"""Logits that are worked on at once, which bounds the memory of sorting them to some 40 MB."""


def chosen_tokens(logits_RV: Tensor, greedy_R: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Token ids [R] int64 for logits [R, V] fp32, the row r by ``choices[r]``; ``greedy_R``: their ``argmax``."""
    if all(choice.temperature == 0.0 for choice in choices):
        return greedy_R
    numbers = [[choice.temperature, choice.top_k, choice.top_p, choice.min_p, choice.uniform] for choice in choices]
    settings_RS = torch.tensor(numbers, dtype=torch.float64, pin_memory=logits_RV.is_cuda).to(
        logits_RV.device, non_blocking=True
    )
    at_once = max(1, _ELEMENTS // logits_RV.shape[1])
    parts = [
        _drawn(logits_RV[row : row + at_once], settings_RS[row : row + at_once], choices[row : row + at_once])
        for row in range(0, len(choices), at_once)
    ]
    return torch.where(settings_RS[:, 0] == 0.0, greedy_R, torch.cat(parts))


def _drawn(logits_RV: Tensor, settings_RS: Tensor, choices: Sequence[Choice]) -> Tensor:
    """One token per row, greedy rows included, whose token has no meaning."""
    temperature, top_k, top_p, min_p, uniform = (column[:, None] for column in settings_RS.unbind(1))
    colder = temperature.clamp(min=_COLDEST).float()
    weights_RV = ((logits_RV - logits_RV.amax(1, keepdim=True)) / colder).exp()
    if any(choice.top_k for choice in choices):
        weights_RV = weights_RV.where(_ranks(logits_RV) < top_k.where(top_k > 0, logits_RV.shape[1]), 0.0)
    if any(choice.top_p < 1.0 for choice in choices):
        weights_RV = _nucleus(weights_RV, top_p)
    if any(choice.min_p > 0.0 for choice in choices):
        weights_RV = weights_RV.where(weights_RV >= min_p.float(), 0.0)
    sums_RV = weights_RV.cumsum(1, dtype=torch.float64)
    found = torch.searchsorted(sums_RV, uniform * sums_RV[:, -1:], right=True)
    last = torch.searchsorted(sums_RV, sums_RV[:, -1:].contiguous())  # the last token that has a weight
    return found.minimum(last)[:, 0]


def _ranks(logits_RV: Tensor) -> Tensor:
    """The place [R, V] of each token by descending logit, equal ones by id."""
    order_RV = torch.argsort(logits_RV, dim=1, descending=True, stable=True)
    places_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return torch.empty_like(order_RV).scatter_(1, order_RV, places_V.expand_as(order_RV))


def _nucleus(weights_RV: Tensor, top_p: Tensor) -> Tensor:
    """The weights of the likeliest tokens of each row with a mass of ``top_p`` [R, 1], and 0 for the others."""
    sorted_RV, order_RV = torch.sort(weights_RV, dim=1, descending=True, stable=True)
    sums_RV = sorted_RV.cumsum(1, dtype=torch.float64)
    before_RV = sums_RV - sorted_RV
    kept_RV = sorted_RV.where((before_RV < top_p * sums_RV[:, -1:]) | (top_p >= 1.0), 0.0)
    return torch.zeros_like(weights_RV).scatter_(1, order_RV, kept_RV)

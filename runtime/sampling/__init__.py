"""Sampling: a request's parameters, changes of logits, and the choice of a token."""

from trt_kv.runtime.sampling.params import SamplingOptions, SamplingParams

__all__ = ["SamplingOptions", "SamplingParams"]

"""Several samples of one prompt: a request and its forks, which differ in their seeds."""

import dataclasses
import secrets
from collections.abc import Callable

from trt_kv.errors import UsageError
from trt_kv.runtime.request import Request
from trt_kv.runtime.reservation import RequestSize, Reservation
from trt_kv.runtime.sampling import SamplingParams


def samples_of(make: Callable[..., Request], params: SamplingParams, *, name: str) -> Request:
    """A request for ``params.n`` samples: the request is the first, its forks are the others.

    ``make(params=..., name=..., forks=...)`` makes each. Sample i has the seed ``params.seed`` + i, as in vLLM; without a seed,
    a random one takes its place.
    """
    if params.n == 1:
        return make(params=params, name=name)
    seed = secrets.randbits(32) if params.seed is None else params.seed
    forks = [
        make(params=dataclasses.replace(params, n=1, seed=seed + i), name=f"sample {i} of {params.n} of {name}")
        for i in range(1, params.n)
    ]
    return make(params=dataclasses.replace(params, seed=seed), name=name, forks=forks)


def check_one_sample(params: SamplingParams) -> None:
    """``UsageError`` if a stream, which has the text of one sample, is asked for several."""
    if params.n > 1:
        raise UsageError(
            "a stream has the text of one sample",
            got=f"n={params.n}",
            expected="n=1",
            fix="call generate(), or submit(), whose request has the others as its forks; or open a stream for each seed",
        )


def check_fits(reservation: Reservation, params: SamplingParams, *, n_prompt: int, limit: int) -> None:
    """``CapacityError`` if the samples can never be served together; before they are made, for ``n`` may be any number."""
    if params.n > 1:
        reservation.check(RequestSize(n_prompt=n_prompt, max_new_tokens=limit, n_sequences=params.n))

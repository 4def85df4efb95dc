"""What clients ask of an engine, and when they got what: also for runners in other environments, so the standard library alone.

Clients are closed loops: each sends its next request when its last one has been answered. Requests start in the order of their
prompts.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Load:
    """A request for each prompt, for exactly ``n_tokens`` greedy tokens, sent by ``n_clients`` at a time."""

    prompts: list[list[int]]
    n_tokens: int
    n_clients: int


@dataclass(kw_only=True)
class Reply:
    """Seconds since the load began: ``sent_s``, and ``token_s`` for each token as it was seen. ``n_tokens`` that it had.

    What was generated is ``text``, or ``token_ids`` where the engine gives no text. ``ended_s``: when an answer ended that was
    seen as text, of which tokens beyond a vocabulary have none. ``why``: it was refused.
    """

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    n_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ended_s: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Served:
    """Replies by prompt."""

    replies: list[Reply]


def closed_loop(load: Load, begin: Callable[[int], None], step: Callable[[], Iterable[tuple[int, list[int]]]]) -> Served:
    """Drive an engine that is called in steps: ``begin(at)`` starts the request for that prompt, ``step()`` runs the engine and
    returns new token ids of requests.
    """
    started = time.perf_counter()
    replies: list[Reply] = []
    n_left = len(load.prompts)

    def send() -> None:
        if len(replies) < len(load.prompts):
            replies.append(Reply(sent_s=time.perf_counter() - started))
            begin(len(replies) - 1)

    for _ in range(load.n_clients):
        send()
    while n_left:
        for at, token_ids in step():
            reply = replies[at]
            reply.token_ids += token_ids
            reply.token_s += [time.perf_counter() - started] * len(token_ids)
            reply.n_tokens = len(reply.token_ids)
            if token_ids and reply.n_tokens >= load.n_tokens:
                n_left -= 1
                send()
    return Served(replies=replies)

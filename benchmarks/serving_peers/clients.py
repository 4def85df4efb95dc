"""Clients of a server over HTTP that read answers as they are written, as server-sent events."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving_peers.loads import Load, Reply, Served

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one event brings. ``n_tokens``: how many the answer has so far, if it says so; ``n_more``: that came with it."""

    text: str = ""
    n_tokens: int | None = None
    n_more: int = 0


@dataclass(frozen=True, kw_only=True)
class Door:
    """A server at a port of 127.0.0.1: where requests go, what they say, and how an event is read."""

    port: int
    path: str
    body: Callable[[list[int], int], Document]
    read: Callable[[Document], Part]


def openai_door(port: int, **fields: Any) -> Door:
    """OpenAI's completions. ``fields``: what this server wants to be told besides."""

    def body(prompt: list[int], n_tokens: int) -> Document:
        asked = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0.0, "ignore_eos": True}
        return asked | {"stream": True, "stream_options": {"include_usage": True}} | fields

    def read(event: Document) -> Part:
        usage = event.get("usage") or {}
        text = "".join(choice["text"] for choice in event.get("choices", ()))
        return Part(text=text, n_tokens=usage.get("completion_tokens"))

    return Door(port=port, path="/v1/completions", body=body, read=read)


def triton_door(port: int, model: str) -> Door:
    """Triton's generate endpoint, for a model of ours."""
    return Door(
        port=port,
        path=f"/v2/models/{model}/generate_stream",
        body=lambda prompt, n_tokens: {
            "input_ids": prompt,
            "max_tokens": n_tokens,
            "temperature": 0.0,
            "end_id": -1,
            "stream": True,
            "return_num_output_tokens": True,
        },
        read=lambda event: Part(text=event["text_output"], n_more=event.get("num_output_tokens", 0)),
    )


@dataclass(kw_only=True)
class _Queue:
    """Prompts that are left, and replies by prompt."""

    load: Load
    started: float
    replies: list[Reply] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_reply(self) -> tuple[list[int], Reply] | None:
        with self.lock:
            if len(self.replies) == len(self.load.prompts):
                return None
            self.replies.append(Reply(sent_s=self.now()))
            return self.load.prompts[len(self.replies) - 1], self.replies[-1]

    def now(self) -> float:
        return time.perf_counter() - self.started


def ask(door: Door, load: Load, *, within_s: float) -> Served:
    """Send the load. A request that is refused, or has no answer within that time, says why."""
    queue = _Queue(load=load, started=time.perf_counter())
    clients = [threading.Thread(target=_client, args=(door, queue, within_s), daemon=True) for _ in range(load.n_clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return Served(replies=queue.replies)


def _client(door: Door, queue: _Queue, within_s: float) -> None:
    while (found := queue.next_reply()) is not None:
        prompt, reply = found
        connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=max(1.0, within_s - queue.now()))
        try:
            _read(connection, door, prompt, reply, queue)
            reply.ended_s = queue.now()
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            reply.why = f"{type(error).__name__}: {error}"[:300]
        finally:
            connection.close()


def _read(connection: http.client.HTTPConnection, door: Door, prompt: list[int], reply: Reply, queue: _Queue) -> None:
    n_tokens = queue.load.n_tokens
    connection.request("POST", door.path, json.dumps(door.body(prompt, n_tokens)), {"Content-Type": "application/json"})
    with connection.getresponse() as response:
        if response.status != http.client.OK:
            reply.why = f"{response.status}: {response.read().decode(errors='replace')}"[:300]
            return
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                reply.why = json.dumps(event["error"])[:300]
                return
            part = door.read(event)
            if part.text:
                reply.token_s.append(queue.now())
                reply.text += part.text
            reply.n_tokens = part.n_tokens if part.n_tokens is not None else reply.n_tokens + part.n_more
    if reply.n_tokens != n_tokens:
        reply.why = f"it answered with {reply.n_tokens} tokens in place of {n_tokens}"

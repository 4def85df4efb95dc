"""POST /v1/chat/completions and /v1/completions: whole answers, and streams of server-sent events."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from trt_kv.errors import TrtKvError
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.turn import Turn
from trt_kv.serving.http.answers import ChatForm, CompletionForm, Form
from trt_kv.serving.http.bodies import ChatBody, CompletionBody, Generating, StreamOptions
from trt_kv.serving.http.context import Context
from trt_kv.serving.http.parameters import chat_request, chat_turn, completion_params, prompts_of
from trt_kv.serving.http.refusals import RefusedError, refusal_of
from trt_kv.serving.http.running import Running
from trt_kv.serving.http.sessions import Held
from trt_kv.serving.http.usage import usage_of
from trt_kv.serving.logs import log_generated

GONE = Response(status_code=499)
"""Nobody reads it: the client has gone away. The number is the one that nginx logs."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for: prompts with parameters, answered in a form. ``names``: parameters by those of
    ``SamplingParams``, for errors about them; ``param``: the one with the prompts.
    """

    prompts: list[str | list[int]]
    params: SamplingParams
    form: Form
    body: Generating
    names: Mapping[str, str]
    param: str
    held: Held | None = None
    turn: Turn | None = None
    """The turn of the conversation ``held``, in place of prompts."""


class EventStream(StreamingResponse):
    """Server-sent events. ``ending`` is closed also for a client that went away before the first one: then they never begin."""

    def __init__(self, events: AsyncIterator[str], ending: contextlib.ExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``StreamingResponse``."""
        with self._ending:
            await super().__call__(scope, receive, send)


async def chat(context: Context, request: Request) -> Response:
    """Answer a conversation."""
    _check_open(context)
    body = await context.body(request, ChatBody)
    context.check_model(body.model)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    names = {"max_new_tokens": limit, "template_variables": "chat_template_kwargs", "json_schema": "response_format"}
    engine, most = context.engine.engine, context.settings.max_new_tokens
    form = ChatForm(model=context.settings.model_name, tokenizer=engine.tokenizer, with_logprobs=bool(body.logprobs))
    ending = contextlib.ExitStack()
    held = None if body.session is None else context.sessions.take(request.state.key_digest, body.session)
    if held is not None:
        ending.callback(context.sessions.give_back, held)
    try:  # in a thread: a template may run for seconds
        turn = None if held is None else await chat_turn(held.session, body, max_new_tokens=most)
        if turn is None:
            prompt, params = await asyncio.to_thread(chat_request, engine, body, max_new_tokens=most)
        else:
            prompt, params = list(turn.history), turn.params
        context.check_prompt(len(prompt), param="messages")
        asked = Asked(
            prompts=[prompt], params=params, form=form, body=body, names=names, param="messages", held=held, turn=turn
        )
        return await _answer(context, request, asked, ending)
    except BaseException as error:
        ending.close()
        if isinstance(error, TrtKvError):
            raise refusal_of(error, names, default_param="messages") from error
        raise


async def complete(context: Context, request: Request) -> Response:
    """Continue prompts."""
    _check_open(context)
    body = await context.body(request, CompletionBody)
    context.check_model(body.model)
    names = {"json_schema": "response_format"}
    engine = context.engine.engine
    try:
        params = completion_params(engine, body)
        prompts: list[str | list[int]] = [
            await asyncio.to_thread(engine.encode, prompt) if prompt else prompt for prompt in prompts_of(body)
        ]
    except TrtKvError as error:
        raise refusal_of(error, names, default_param="prompt") from error
    for prompt in prompts:
        context.check_prompt(len(prompt), param="prompt")
    echoed = [_text(engine.tokenizer, prompt) if body.echo else "" for prompt in prompts_of(body)]
    form = CompletionForm(
        model=context.settings.model_name,
        tokenizer=engine.tokenizer,
        with_logprobs=body.logprobs is not None,
        echoed=echoed,
        n=params.n,
    )
    asked = Asked(prompts=prompts, params=params, form=form, body=body, names=names, param="prompt")
    return await _answer(context, request, asked, contextlib.ExitStack())


def _check_open(context: Context) -> None:
    """Refuse a request before anything is computed for it, if there will be no place for it."""
    try:
        context.admission.check_open()
    except TrtKvError as error:
        raise refusal_of(error) from error


def _text(tokenizer: Any, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


async def _answer(context: Context, request: Request, asked: Asked, ending: contextlib.ExitStack) -> Response:
    """Run what is asked for: an answer, or a stream of its chunks. If the client goes away, it is ended. ``ending``: closed at
    the end of the answer, in any case but an error that is raised here.
    """
    if asked.body.stream_options is not None and not asked.body.stream:
        raise RefusedError(400, "stream_options needs stream to be true", param="stream_options", code="invalid_value")
    running = Running(context.engine, context.admission)
    params = _salted(asked.params, request.state.key_digest)
    try:
        if asked.turn is None:
            await running.start(asked.prompts, params)
        else:
            await running.start_turn(dataclasses.replace(asked.turn, params=params))
    except TrtKvError as error:
        raise refusal_of(error, asked.names, default_param=asked.param) from error
    ending.callback(_log_end, context, running, request.state.request_id)
    ending.callback(running.close)
    if asked.body.stream:
        return EventStream(_events(asked, running, asked.body.stream_options or StreamOptions(), ending), ending)
    with ending:
        try:
            results = await _unless_gone(request, running)
            usage = {} if results is None else usage_of(results) | await _recorded(asked, running)
        except TrtKvError as error:
            raise refusal_of(error, asked.names) from error
    return GONE if results is None else JSONResponse(asked.form.whole(results, usage))


async def _recorded(asked: Asked, running: Running) -> dict[str, Any]:
    """What usage tells of the conversation, to which the turn that has ended is added; nothing if it is of none."""
    if asked.held is None or asked.turn is None:
        return {}
    await asked.held.record(asked.turn, running)
    return {"session": asked.held.to_json()}


def _salted(params: SamplingParams, key_digest: str) -> SamplingParams:
    """Parameters whose prefixes only requests with the same API key, and the same salt, can find."""
    return dataclasses.replace(params, cache_salt=f"{key_digest}/{params.cache_salt}") if key_digest else params


async def _unless_gone(request: Request, running: Running) -> list[Generation] | None:
    """The results; None, at once, if the client goes away before."""
    ended = asyncio.ensure_future(running.end())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
        return ended.result() if ended.done() else None
    finally:
        ended.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(asked: Asked, running: Running, options: StreamOptions, ending: contextlib.ExitStack) -> AsyncIterator[str]:
    """The answer as server-sent events. Starlette cancels it if the client goes away."""
    form = asked.form
    try:
        for index in range(len(running.samples)):
            if (begin := form.first(index)) is not None:
                yield _event(begin)
        async for news in running.news():
            chunk = form.chunk(news)
            if options.continuous_usage_stats:
                chunk["usage"] = usage_of(running.results)
            elif options.include_usage:
                chunk["usage"] = None
            yield _event(chunk)
        told = await _recorded(asked, running)
        if options.include_usage:
            yield _event(form.last() | {"usage": usage_of(running.results) | told})
    except TrtKvError as error:
        yield _event(refusal_of(error, asked.names).to_json())
    finally:
        ending.close()  # before the client knows that it may send the next turn
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


def _log_end(context: Context, running: Running, request_id: str) -> None:
    """One line for each sample: its sizes and times, and its text only if the server was told so."""
    for sample in running.samples:
        tokenizer = context.engine.engine.tokenizer
        texts: dict[str, Any] = {}
        if context.settings.log_prompts:
            texts = {"prompt": tokenizer.decode(list(sample.prompt_ids)), "text": sample.result().text}
        log_generated(sample, request_id=request_id, **texts)

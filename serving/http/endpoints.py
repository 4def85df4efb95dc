"""The endpoints that generate nothing: models, tokens, health, metrics, and the chat page."""

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from trt_kv.errors import TrtKvError
from trt_kv.serving.http.bodies import DetokenizeBody, TokenizeBody
from trt_kv.serving.http.context import Context
from trt_kv.serving.http.logprobs import text_of_token
from trt_kv.serving.http.parameters import template_options
from trt_kv.serving.http.refusals import RefusedError, refusal_of
from trt_kv.serving.metrics import Family, counter, exposition, families_of, gauge

PAGE = Path(__file__).with_name("page.html")
_POLICY_OF_PAGE = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def models(context: Context, request: Request) -> Response:
    """The models of this server: one."""
    return JSONResponse({"object": "list", "data": [_model(context)]})


async def model(context: Context, request: Request) -> Response:
    """One model."""
    context.check_model(request.path_params["name"])
    return JSONResponse(_model(context))


async def tokenize(context: Context, request: Request) -> Response:
    """Token ids of a text, or of a conversation."""
    body = await context.body(request, TokenizeBody)
    context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RefusedError(400, "expected either prompt or messages", param="prompt", code="invalid_value")
    engine = context.engine.engine
    try:
        if body.messages is not None:
            ids = await asyncio.to_thread(engine.encode_chat, body.messages, **template_options(body))
        else:
            encode = engine.encode if body.add_special_tokens else engine.encode_part
            ids = await asyncio.to_thread(encode, body.prompt or "")
    except TrtKvError as error:
        raise refusal_of(error, default_param="prompt" if body.messages is None else "messages") from error
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": engine.manifest.config.max_positions, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [text_of_token(engine.tokenizer, token_id) for token_id in ids]
    return JSONResponse(answer)


async def detokenize(context: Context, request: Request) -> Response:
    """The text of token ids."""
    body = await context.body(request, DetokenizeBody)
    context.check_model(body.model)
    engine = context.engine.engine
    vocab_size = engine.manifest.config.vocab_size
    if not all(0 <= token < vocab_size for token in body.tokens):
        text = f"tokens has token ids outside the vocabulary: expected 0 .. {vocab_size - 1}"
        raise RefusedError(400, text, param="tokens", code="invalid_value")
    return JSONResponse({"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)})


async def health(context: Context, request: Request) -> Response:
    """Whether the server answers."""
    return JSONResponse({"status": "ok"})


async def ready(context: Context, request: Request) -> Response:
    """Whether it takes requests: not while it shuts down."""
    draining = context.admission.is_draining
    return JSONResponse({"status": "draining" if draining else "ready"}, status_code=503 if draining else 200)


async def metrics(context: Context, request: Request) -> Response:
    """Prometheus' text format."""
    families = families_of(context.engine.engine, model_name=context.settings.model_name)
    return Response(exposition([*families, *_of_server(context)]), media_type=METRICS_TYPE)


async def page(context: Context, request: Request) -> Response:
    """The chat page: one file, without anything from elsewhere."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY_OF_PAGE})


def _of_server(context: Context) -> list[Family]:
    name = context.settings.model_name
    inside, refused = context.admission.n_inside, context.admission.n_refused
    return [
        gauge("trt_kv_requests_inside", "Requests that have been taken and have not ended.", inside, model_name=name),
        counter("trt_kv_requests_refused_total", "Requests refused for a full queue.", refused, model_name=name),
    ]


def _model(context: Context) -> dict[str, Any]:
    manifest = context.engine.engine.manifest
    return {
        "id": context.settings.model_name,
        "object": "model",
        "created": context.created,
        "owned_by": "trt-kv",
        "max_model_len": manifest.config.max_positions,
        "policy": manifest.policy.name,
    }

"""Engine folder -> text."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Unpack

import torch
from tokenizers import Tokenizer

from trt_kv.errors import EngineError, RecallError, UsageError
from trt_kv.manifest import Manifest, load_manifest, verify_files
from trt_kv.require import require
from trt_kv.runtime.backends.devices import HOST, DeviceOptions, device_from_name
from trt_kv.runtime.backends.host.load import load as load_on_host
from trt_kv.runtime.compatibility import check_applicable, check_recipe
from trt_kv.runtime.loading import Loaded, LoadOptions, OnProgress
from trt_kv.runtime.model_runner import DEFAULT_CHUNK, ModelRunner
from trt_kv.runtime.request import Generation, Request
from trt_kv.runtime.sampling import SamplingOptions, SamplingParams
from trt_kv.runtime.text.detokenizer import load_tokenizer
from trt_kv.runtime.trace import NO_TRACE, Trace

Prompt = str | Sequence[int]
"""Text, or token ids that are used as they are."""


class Engine:
    """A loaded engine.

    >>> engine = Engine.load("engines/llama3-prefixkv")
    >>> engine.generate("the old man ...", max_new_tokens=32).text
    """

    def __init__(self, folder: Path, manifest: Manifest, loaded: Loaded, tokenizer: Tokenizer) -> None:
        """Use ``Engine.load``."""
        self.folder = folder
        self.manifest = manifest
        self.loaded = loaded
        self.tokenizer = tokenizer

    @property
    def runner(self) -> ModelRunner:
        """What runs the engine's steps."""
        return self.loaded.runner

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        verify: bool = True,
        device: str = HOST,
        dense: str | None = None,
        dtype: str | None = None,
        batch: int | None = None,
        profile: str | None = None,
        cuda_graphs: bool | None = None,
        cache_tokens: int | None = None,
        host_tier: str | None = None,
        host_tokens: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        n_threads: int = 0,
        trace: Trace = NO_TRACE,
        on_progress: OnProgress | None = None,
    ) -> "Engine":
        """Open an engine folder.

        ``verify`` checks every file's digest. ``cache_tokens`` sizes the KV pool: it holds that many tokens in every layer; by
        default twice the model's positions, or what fits into half of the free memory. ``chunk`` is the number of prompt
        tokens per prefill step. ``n_threads`` 0: one per core. ``trace`` records what ran when.

        For engines whose cache stays on the host: ``host_tier`` is "ram" (the default) or "mmap:PATH", a file that need not fit
        into memory; ``host_tokens`` sizes it as ``cache_tokens`` sizes the pool, which then holds working sets.

        ``device`` "cpu": what the engine was built for. "cuda" or "cuda:N": an engine for ONNX Runtime runs on an NVIDIA GPU,
        its ops as Triton kernels, a cache on the host in pinned memory; all memory is taken at once. Then ``dense`` says what
        runs the dense parts: "torch" (the default), which converts weights to ``dtype`` ("float32", "float16", "bfloat16") as
        it loads them, or "onnxruntime" (needs onnxruntime-gpu), which computes in the engine's. At most ``batch`` sequences
        decode together (default: the profile's, else 8). ``profile``: a build profile, by name or file, whose largest sizes
        bound steps, contexts and the cache. ``cuda_graphs`` records decode steps; None: where that is possible.

        Raises ``EngineError`` for anything that is not a complete, untouched engine whose policy this version applies,
        ``UsageError`` for what cannot run on ``device``, ``CapacityError`` where that has too little memory.
        """
        options = LoadOptions(
            cache_tokens=cache_tokens,
            host_tier=host_tier,
            host_tokens=host_tokens,
            chunk=chunk,
            n_threads=n_threads,
            trace=trace,
        )
        on = DeviceOptions(dense=dense, dtype=dtype, batch=batch, profile=profile, cuda_graphs=cuda_graphs)
        place = device_from_name(device)
        if place is None:
            on.check_host()
        return cls._open(Path(path), options, on, place, verify=verify, tell=on_progress or _tell_nobody)

    @classmethod
    def _open(
        cls,
        folder: Path,
        options: LoadOptions,
        on: DeviceOptions,
        device: torch.device | None,
        *,
        verify: bool,
        tell: OnProgress,
    ) -> "Engine":
        """``device`` None: what the engine was built for. On the device "cpu" Triton's interpreter runs kernels of devices."""
        manifest = load_manifest(folder)
        check_applicable(folder, manifest)
        if verify:
            _verify_with_progress(folder, manifest, tell)
        check_recipe(folder, manifest)
        tokenizer = load_tokenizer(folder / "tokenizer.json", error=EngineError)
        if device is not None:
            loaded = require("trt_kv.runtime.backends.cuda.load").load(folder, manifest, options, on, device, tell)
        elif manifest.plan is not None:
            loaded = require("trt_kv.runtime.backends.tensorrt.load").load(folder, manifest, options, tell)
        else:
            loaded = load_on_host(folder, manifest, options, tell)
        tell("compiling kernels", 0, 1)
        loaded.runner.warm_up()
        tell("compiling kernels", 1, 1)
        return cls(folder, manifest, loaded, tokenizer)

    def generate(self, prompt: Prompt, **sampling: Unpack[SamplingOptions]) -> Generation:
        """Continue one prompt; options as in ``SamplingParams``. ``UsageError`` and ``CapacityError`` come before it starts;
        ``RecallError`` where its cache on the host was lost.
        """
        (result,) = self.generate_batch([prompt], **sampling)
        if result.error is not None:
            raise result.error
        return result

    def generate_batch(self, prompts: Sequence[Prompt], **sampling: Unpack[SamplingOptions]) -> list[Generation]:
        """Continue several prompts together; each gets the tokens it would get alone.

        A request whose cache on the host was lost ends with what it has, ``finish_reason`` "error" and its ``error``.
        """
        requests = self._admit(prompts, SamplingParams(**sampling))
        for _ in self._run(requests):
            pass
        return [request.result() for request in requests]

    def stream(
        self, prompt: Prompt, *, on_prefill: Callable[[int], None] | None = None, **sampling: Unpack[SamplingOptions]
    ) -> "Stream":
        """Continue one prompt, piece by piece; ``on_prefill`` is told how many prompt tokens are done."""
        (request,) = self._admit([prompt], SamplingParams(**sampling))
        return Stream(request, self._run([request], on_prefill))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, special tokens as the tokenizer adds them."""
        return list(self.tokenizer.encode(prompt).ids) if isinstance(prompt, str) else [int(token) for token in prompt]

    def close(self) -> None:
        """Stop background work and let go of a host tier; the engine runs nothing afterwards. Memory on a device, and what is
        pinned for it, goes with the engine itself.
        """
        self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Request]:
        """Requests for prompts that fit the model and, together and at their largest, the pool."""
        if isinstance(prompts, str):
            raise UsageError("a batch is a list of prompts", got="one text", expected="a list", fix="call generate()")
        config = self.manifest.config
        requests = []
        for prompt in prompts:
            ids = self.encode(prompt)
            _check_prompt(prompt, ids, config.max_positions, config.vocab_size)
            requests.append(
                Request(
                    prompt_ids=ids,
                    params=params,
                    tokenizer=self.tokenizer,
                    eos_token_ids=config.eos_token_ids,
                    limit=min(params.max_new_tokens, config.max_positions - len(ids) + 1),
                    sequence=self.runner.new_sequence(),
                )
            )
        self.loaded.admission.check(requests)
        return requests

    def _run(self, requests: Sequence[Request], on_prefill: Callable[[int], None] | None = None) -> Iterator[tuple[int, str]]:
        """Prefill each request, then decode all unfinished ones together; yields (request index, new text)."""
        finished = False
        try:
            with self.loaded.admission.promise(requests):
                for index, request in enumerate(requests):
                    try:
                        logits_V = self.runner.prefill(request.sequence, request.prompt_ids, on_chunk=on_prefill)
                    except RecallError as error:
                        yield index, request.fail(error)
                    else:
                        yield index, request.accept(logits_V)
                while running := [i for i, request in enumerate(requests) if request.finish_reason is None]:
                    batch = [requests[i] for i in running]
                    logits_BV = self.runner.decode(
                        [r.sequence for r in batch], [r.token_ids[-1] for r in batch], failures_stay=True
                    )
                    for request, index, logits_V in zip(batch, running, logits_BV, strict=True):
                        failure = request.sequence.failure
                        yield index, request.accept(logits_V) if failure is None else request.fail(failure)
            finished = True
        finally:
            for request in requests:
                request.close()
            if not finished:
                self.runner.reclaim()


class Stream(Iterator[str]):
    """Text pieces of one request as they become certain; ``result`` afterwards."""

    def __init__(self, request: Request, events: Iterator[tuple[int, str]]) -> None:
        self._request = request
        self._pieces = (piece for _, piece in events if piece)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            if self._request.error is not None:
                raise self._request.error from None
            raise

    @property
    def result(self) -> Generation:
        """What has been generated so far."""
        return self._request.result()


def _check_prompt(prompt: Prompt, ids: Sequence[int], max_positions: int, vocab_size: int) -> None:
    if not ids or (isinstance(prompt, str) and not prompt.strip()):
        raise UsageError("the prompt is empty", expected="at least one token", fix="pass some text")
    if len(ids) > max_positions:
        raise UsageError(
            "the prompt is longer than the model's positions",
            got=f"{len(ids)} tokens",
            expected=f"at most {max_positions}",
            fix="shorten the prompt or use a checkpoint with a longer context",
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UsageError(
            "the prompt has token ids outside the vocabulary", got=[min(ids), max(ids)], expected=f"0 .. {vocab_size - 1}"
        )


def _tell_nobody(stage: str, done: int, total: int) -> None:
    """The progress callback of callers that gave none."""


def _verify_with_progress(folder: Path, manifest: Manifest, on_progress: OnProgress) -> None:
    total = sum(record.n_bytes for record in manifest.files.values())
    done = 0

    def on_bytes(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        on_progress("checking digests", done, total)

    verify_files(folder, manifest, on_bytes)

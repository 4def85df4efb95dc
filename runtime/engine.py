"""``Engine``: loads an engine folder and generates text with it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from tokenizers import Tokenizer

from trt_kv.errors import TrtKvError, UsageError
from trt_kv.manifest import Manifest
from trt_kv.runtime.backends.devices import HOST, DeviceOptions, device_from_name
from trt_kv.runtime.cache.states import SequenceState
from trt_kv.runtime.chat import EngineChat
from trt_kv.runtime.engine_core import EngineCore
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.loading import Loaded, LoadOptions, OnProgress
from trt_kv.runtime.memory import memory_error
from trt_kv.runtime.model_runner import DEFAULT_CHUNK, ModelRunner
from trt_kv.runtime.opening import open_engine
from trt_kv.runtime.prefix.pins import EnginePins
from trt_kv.runtime.request import Request
from trt_kv.runtime.samples import check_fits, check_one_sample, samples_of
from trt_kv.runtime.sampling import SamplingOptions, SamplingParams
from trt_kv.runtime.sampling.model_defaults import NO_DEFAULTS, ModelDefaults, params_of_each
from trt_kv.runtime.sampling.structure import Structures
from trt_kv.runtime.session import EngineSessions
from trt_kv.runtime.stream import Stream
from trt_kv.runtime.text.prompts import Prompt, PromptEncoder, prompt_name
from trt_kv.runtime.trace import NO_TRACE, Trace
from trt_kv.runtime.turn import Turn

if TYPE_CHECKING:
    import torch


class Engine(EngineChat, EnginePins, EngineSessions):
    """A loaded engine. Threads may share it: each waits for its own requests, and their requests are batched together.

    >>> engine = Engine.load("engines/llama3-prefixkv")
    >>> engine.generate("the old man ...", max_new_tokens=32).text
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        loaded: Loaded,
        tokenizer: Tokenizer,
        model_defaults: ModelDefaults = NO_DEFAULTS,
    ) -> None:
        """Use ``Engine.load`` instead."""
        self.folder = folder
        self.manifest = manifest
        self.loaded = loaded
        self.tokenizer = tokenizer
        self.model_defaults = model_defaults
        config = manifest.config
        self._prompts = PromptEncoder(tokenizer, max_positions=config.max_positions, vocab_size=config.vocab_size)
        self._structures = Structures(tokenizer, vocab_size=config.vocab_size, end_ids=config.eos_token_ids)
        self.core = EngineCore(loaded.runner, loaded.reservation, token_budget=loaded.token_budget, prefixes=loaded.prefixes)

    @property
    def runner(self) -> ModelRunner:
        """What runs the engine's steps."""
        return self.loaded.runner

    @property
    def default_sampling(self) -> SamplingParams:
        """The parameters of requests that give none: those of the model's ``generation_config.json``, greedy unless it says
        otherwise. Parameters given by name replace single ones; a ``SamplingParams`` replaces all, also those it leaves at
        its own defaults.
        """
        return self.model_defaults.params

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        verify: bool = True,
        digest: str | None = None,
        model_defaults: bool = True,
        device: str = HOST,
        dense: str | None = None,
        precision: str | None = None,
        dtype: str | None = None,
        batch: int | None = None,
        profile: str | None = None,
        cuda_graphs: bool | None = None,
        batch_invariant: bool | None = None,
        cache_tokens: int | None = None,
        host_tier: str | None = None,
        host_tokens: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        token_budget: int | None = None,
        max_sequences: int | None = None,
        n_threads: int = 0,
        kv_dtype: str | None = None,
        prefix_cache: bool = True,
        prefix_bytes: int | None = None,
        prefix_store: str | None = None,
        trace: Trace = NO_TRACE,
        on_progress: OnProgress | None = None,
    ) -> "Engine":
        """Open an engine folder.

        ``verify`` checks every file's digest; without it, only names and sizes. ``digest`` ("sha256:...", from ``trt-kv
        inspect``) is that of the only engine to accept; digests alone do not tell who made an engine. ``model_defaults``: use
        the sampling parameters of the model's ``generation_config.json``, see ``default_sampling``. ``cache_tokens`` sizes
        the KV pool: it holds that many tokens in every layer; by default twice the model's positions, or what fits into half
        of the free memory. ``chunk`` is the number of prompt tokens per prefill step; ``token_budget`` limits the prompt
        tokens between two decode steps (None: one chunk). At most ``max_sequences`` run at once (None: 256, or what the
        device was planned for); others wait. ``n_threads``: those that compute; 0 is one per CPU that
        this process may use, the most that start. ``kv_dtype``: on a CPU keys and
        values are stored as "float32", "float16", "bfloat16" or "int8"; None: as the engine was built. ``trace`` records timing
        spans.

        For engines whose cache is on the host: ``host_tier`` is "ram" (the default) or "file:PATH", a file that need not fit
        into memory. ``host_tokens`` sizes it as ``cache_tokens`` sizes the pool, which then holds the layers that do not
        recall and, unless a CPU reads the tier in memory, working sets.

        ``prefix_cache``: prompts that begin like an earlier one continue from copies of what it had cached, with the result
        that they have without. Copies end where a chunk ends. ``prefix_bytes`` limits their memory (None: an eighth of what is
        free), in which the least recently used are replaced. ``prefix_store``: a folder in which they outlive the engine.

        ``device`` "cpu": the target that the engine was built for. There, ``dense`` runs the dense layers of an engine for
        ONNX Runtime: "native", kernels of our own for quantised weights with activations in int8 (the default for these),
        "onnxruntime" (the default for others), or "openvino" (needs the extra ``openvino``), which
        multiplies weights by activations in ``precision``: "float32", "bfloat16", or "int8" for quantised weights (None: what
        the engine was built for). "cuda" or "cuda:N": an engine for ONNX Runtime runs on an NVIDIA GPU, its ops as Triton
        kernels, a cache on the host in pinned memory; caches are allocated when it is loaded.
        There, ``dense`` is the library that runs the dense layers: "torch" (the default), which converts weights to ``dtype``
        ("float32", "float16", "bfloat16") as it loads them, or "onnxruntime" (needs onnxruntime-gpu), which computes in the
        engine's dtype. At most ``batch`` sequences decode together (default: the profile's, else 8). ``profile``: a build
        profile, by name or file, whose largest sizes bound steps, contexts and the cache. ``cuda_graphs``: capture decode steps
        as CUDA graphs; None: if possible.

        ``batch_invariant``: the logits of a request are bit-identical in any batch. On the CPU that is the default: if products
        with quantised weights depend on the number of rows, rows are added; False: never. On a GPU the default is False; with
        True every decode step is padded to the largest sizes.

        Raises ``EngineError`` unless the folder is a complete, unchanged engine whose policy this version applies,
        ``UsageError`` for what cannot run on ``device``, ``CapacityError`` if the device has too little memory.
        """
        options = LoadOptions(
            cache_tokens=cache_tokens,
            host_tier=host_tier,
            host_tokens=host_tokens,
            chunk=chunk,
            token_budget=token_budget,
            max_sequences=max_sequences,
            n_threads=n_threads,
            batch_invariant=batch_invariant,
            dense=dense if device == HOST else None,
            precision=precision,
            kv_dtype=kv_dtype,
            prefix_cache=prefix_cache,
            prefix_bytes=prefix_bytes,
            prefix_store=prefix_store,
            trace=trace,
        )
        on = DeviceOptions(
            dense=dense if device != HOST else None,
            dtype=dtype,
            batch=batch,
            profile=profile,
            cuda_graphs=cuda_graphs,
            batch_invariant=batch_invariant,
        )
        place = device_from_name(device)
        if place is None:
            on.check_host()
        if not isinstance(path, str | Path) or not str(path).strip():
            raise UsageError(
                "the engine is not given by its folder", got=repr(path), expected="a path, as text or pathlib.Path"
            )
        for name, flag in (("verify", verify), ("model_defaults", model_defaults)):
            if not isinstance(flag, bool):
                raise UsageError(f"bad {name}", got=repr(flag), expected="True or False")
        if digest is not None and not verify:
            raise UsageError(
                "a digest pins an engine only if its files are verified", got="verify=False", fix="leave verify out, or digest"
            )
        try:
            tell = on_progress or _tell_nobody
            engine = cls._open(Path(path), options, on, place, verify=verify, digest=digest, tell=tell, defaults=model_defaults)
        except Exception as error:
            if (no_memory := memory_error(error, "loading the engine")) is not None:
                raise no_memory from error
            raise
        return engine

    @classmethod
    def _open(
        cls,
        folder: Path,
        options: LoadOptions,
        on: DeviceOptions,
        device: "torch.device | None",
        *,
        verify: bool,
        digest: str | None = None,
        tell: OnProgress,
        defaults: bool = True,
    ) -> "Engine":
        """``device`` None: the target that the engine was built for. On "cpu", Triton's interpreter runs the device kernels."""
        opened = open_engine(folder, options, on, device, verify=verify, digest=digest, tell=tell, defaults=defaults)
        return cls(folder, opened.manifest, opened.loaded, opened.tokenizer, opened.model_defaults)

    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Unpack[SamplingOptions]) -> Generation:
        """Generate the continuation of one prompt; options as in ``SamplingParams``, in place of ``default_sampling``. Raises
        ``UsageError`` and ``CapacityError`` before it starts, and the error that ends it, or one of its samples, early
        (``RecallError``, ``LogitsError``).
        """
        (result,) = self.generate_batch([prompt], params, **sampling)
        for sample in result.samples:
            if sample.error is not None:
                raise sample.error
        return result

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Generation]:
        """Generate the continuations of several prompts, each with the tokens it would get alone. ``params``: for all prompts,
        or one per prompt.

        Prompts for which there is too little memory now wait. A request that fails ends with the tokens it has,
        ``finish_reason`` "error" and its ``error``; the others are not affected. Raises ``UsageError`` and ``CapacityError``
        before any of them starts.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise UsageError(
                "a batch is a list of prompts", got=f"one {type(prompts).__name__}", expected="a list", fix="call generate()"
            )
        requests = self._requests(prompts, params_of_each(len(prompts), params, sampling, self.default_sampling))
        everyone = [one for request in requests for one in request.family]
        try:
            self.core.add(requests)
            self.core.wait(lambda: all(one.is_finished for one in everyone))
        finally:
            for request in requests:
                self.core.cancel(request)
        for one in everyone:
            if one.error is not None and not isinstance(one.error, TrtKvError):
                raise one.error
        return [request.result() for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: Callable[[int], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Stream the continuation of one prompt. ``on_prefill`` is called with the number of prompt tokens computed so far.

        The request is queued now and progresses whenever this or another thread waits for any request of this engine. Closing
        the stream, or dropping it, cancels the request. Raises ``UsageError`` and ``CapacityError`` now, and from the stream
        the error that ends the request early (``RecallError``, ``LogitsError``).
        """
        (of_prompt,) = params_of_each(1, params, sampling, self.default_sampling)
        check_one_sample(of_prompt)
        return Stream(self.core, self.submit(prompt, of_prompt), on_prefill)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_update: Callable[[], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Request:
        """Queue a request and return it immediately, for servers: ``core`` runs it. ``on_update``: see ``Request``. If ``n``
        asks for several samples, the others are its ``forks``.
        """
        (request,) = self._requests([prompt], params_of_each(1, params, sampling, self.default_sampling))
        for one in request.family:
            one.on_update = on_update
        self.core.add([request])
        return request

    def submit_turn(self, turn: Turn, *, on_update: Callable[[], None] | None = None) -> Request:
        """Queue a turn of a ``Session``, as ``submit`` does."""
        (request,) = self._requests([turn.prompt_ids], [turn.params], begins_with=turn.begins_with)
        request.keeps_state, request.on_update = turn.keeps_state, on_update
        self.core.add([request])
        return request

    def encode(self, prompt: Prompt, *, parse_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts in front, unless a text begins with them.

        ``parse_special_tokens``: see ``SamplingParams``.
        """
        return self._prompts.encode(prompt, parse_special_tokens=parse_special_tokens)

    def encode_part(self, text: str, *, parse_special_tokens: bool = True) -> list[int]:
        """Token ids of a part of a prompt: without the special tokens that the tokenizer puts in front of a whole one."""
        return self._prompts.encode(text, parse_special_tokens=parse_special_tokens, is_whole=False)

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics as JSON: ``EngineStatistics``, reserved resources, pages per pool, and counts of recall."""
        found = self.core.statistics.to_json()
        resources = zip(self.core.reservation.resources, self.core.reservation.used, strict=True)
        found["reserved"] = {resource.name: {"used": used, "total": resource.total} for resource, used in resources}
        pools = [self.runner.pool, *([self.runner.tiers.host] if self.runner.tiers is not None else [])]
        found["pages"] = {pool.name: {"used": pool.n_pages - pool.n_free, "total": pool.n_pages} for pool in pools}
        if self.runner.tiers is not None and self.runner.tiers.statistics is not None:
            found["recall"] = self.runner.tiers.statistics.to_json()
        if self.core.prefixes is not None:
            found["prefix_cache"] = self.core.prefixes.statistics.to_json()
        return found

    def close(self) -> None:
        """End all requests, stop background work and free a host tier; the engine cannot be used afterwards. Memory of a device
        and memory pinned for it are freed when the engine object is deleted.
        """
        self.core.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], begins_with: SequenceState | None = None
    ) -> list[Request]:
        """Requests for prompts that fit the model, behind what they begin with."""
        config, n_before = self.manifest.config, 0 if begins_with is None else begins_with.num_computed_tokens
        requests = []
        for index, (prompt, of_prompt) in enumerate(zip(prompts, params, strict=True)):
            ids = self._prompts.encode_fitting(
                prompt, parse_special_tokens=of_prompt.parse_special_tokens, name=prompt_name(index, len(prompts))
            )
            of_prompt.check_vocabulary(config.vocab_size)
            limit = min(of_prompt.max_new_tokens, config.max_positions - n_before - len(ids) + 1)
            check_fits(self.core.reservation, of_prompt, n_prompt=len(ids), limit=limit)
            make = partial(self._sample, prompt_ids=ids, limit=limit, begins_with=begins_with)
            name = f"request {index} of {len(prompts)}" if len(prompts) > 1 else "the request"
            requests.append(samples_of(make, of_prompt, name=name))
        return requests

    def _sample(self, *, params: SamplingParams, **given: Any) -> Request:
        """A request for one sample of a prompt; ``given``: its other fields."""
        ends = self.manifest.config.eos_token_ids
        structure = self._structures.of(params)
        return Request(params=params, tokenizer=self.tokenizer, eos_token_ids=ends, structure=structure, **given)


def _tell_nobody(stage: str, done: int, total: int) -> None:
    """The progress callback if the caller gives none."""

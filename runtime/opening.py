"""Opens an engine folder: checks what it holds, and loads it with the backend of its target or of a device."""

import contextlib
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from trt_kv.engine_files import check_files, verified
from trt_kv.manifest import Manifest, load_manifest
from trt_kv.require import require
from trt_kv.runtime.backends.devices import DeviceOptions
from trt_kv.runtime.backends.host.load import load as load_on_host
from trt_kv.runtime.compatibility import check_compatible, check_recipe, check_weights
from trt_kv.runtime.kernel_threads import release_kernel_threads
from trt_kv.runtime.loading import Loaded, LoadOptions, OnProgress
from trt_kv.runtime.prefix.opening import open_prefixes
from trt_kv.runtime.processes import check_can_load, will_compute
from trt_kv.runtime.sampling.model_defaults import NO_DEFAULTS, ModelDefaults, model_defaults_of
from trt_kv.runtime.text.tokenizer import tokenizer_of_engine

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class OpenedEngine:
    """What ``Engine`` is made of."""

    manifest: Manifest
    loaded: Loaded
    tokenizer: Tokenizer
    model_defaults: ModelDefaults


def open_engine(
    folder: Path,
    options: LoadOptions,
    on: DeviceOptions,
    device: "torch.device | None",
    *,
    verify: bool,
    digest: str | None,
    tell: OnProgress,
    defaults: bool,
) -> OpenedEngine:
    """Open ``folder``; arguments and errors as for ``Engine.load``.

    ``device`` None: the target that the engine was built for. On "cpu", Triton's interpreter runs the device kernels.
    """
    check_can_load()
    manifest = load_manifest(folder, digest=digest)
    check_compatible(folder, manifest)
    if not verify:
        check_files(folder, manifest)
    verifying = verified(folder, manifest, partial(tell, "checking digests")) if verify else contextlib.nullcontext()
    with contextlib.ExitStack() as undo:
        with verifying:
            check_weights(folder, manifest)
            check_recipe(folder, manifest)
            tokenizer = tokenizer_of_engine(folder, manifest)
            model_defaults = model_defaults_of(folder, manifest) if defaults else NO_DEFAULTS
            if device is not None:
                device_load = require("trt_kv.runtime.backends.cuda.load", extra="gpu").load
                loaded = device_load(folder, manifest, options, on, device, tell)
            elif manifest.plan is not None:
                loaded = require("trt_kv.runtime.backends.tensorrt.load", extra="gpu").load(folder, manifest, options, tell)
            else:
                loaded = load_on_host(folder, manifest, options, tell)
            undo.callback(loaded.runner.close)
            if options.prefix_cache:
                prefixes = open_prefixes(manifest, loaded.runner, options)
                loaded = dataclasses.replace(loaded, prefixes=prefixes)
            tell("compiling kernels", 0, 1)
            will_compute()
            loaded.runner.warm_up()
            release_kernel_threads()  # another thread may run the steps
            tell("compiling kernels", 1, 1)
        undo.pop_all()
    return OpenedEngine(manifest=manifest, loaded=loaded, tokenizer=tokenizer, model_defaults=model_defaults)

"""The class that Triton's Python backend loads, from the ``model.py`` of a model repository."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trt_kv.serving.triton.tensors import complete_config


class TritonPythonModel:
    """One engine. The methods are those that the backend calls; ``is_ready`` by releases that know it."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Triton's process for this imports nothing heavy."""
        return complete_config(config)

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine. What is wrong with it, or with ``model.json``, becomes Triton's reason for not loading the model."""
        import triton_python_backend_utils as backend

        from trt_kv.serving.logs import log_to
        from trt_kv.serving.triton.service import Service, load_engine
        from trt_kv.serving.triton.watch import Watch

        log_to(sys.stderr)
        folder = Path(args["model_repository"]) / args["model_version"]
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        engine, options = load_engine(folder, gpu=gpu)
        self._service = Service(engine, options, backend, model_name=args["model_name"])
        self._watch = Watch(os.getppid()) if options.end_server_if_killed else None

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their answers are sent as they are made."""
        for request in requests:
            self._service.take(request)

    def is_ready(self) -> bool:
        """Whether the engine can run requests."""
        return self._service.is_ready

    def finalize(self) -> None:
        """Wait for requests that run, for a time; end the others; close the engine."""
        if self._watch is not None:
            self._watch.close()
        self._service.close()

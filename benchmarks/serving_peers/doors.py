"""The same engine in process, behind ``trt-kv serve`` and behind tritonserver: what a door costs."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import peers_folder
from benchmarks.peers.protocol import Refusal, Setup
from benchmarks.peers.rows import FULL, INT4
from benchmarks.peers.subjects import Subject, engine_for
from benchmarks.serving_peers.clients import triton_door
from benchmarks.serving_peers.contenders import AtDoor, Contender, runner
from benchmarks.serving_peers.plan import HTTP, IN_PROCESS, TRITON
from benchmarks.serving_peers.rows import PACKAGE, Opened, Room, our_cache, our_server
from trt_kv.export.triton_repository import FOLDER, VERSION, write_repository
from trt_kv.openmp import WAITING

MODEL = "smollm2"


def doors_of(subject: Subject, room: Room) -> dict[str, Opened]:
    """By name, none of them started. All have the same options."""
    engine = engine_for(subject, FULL | INT4)
    options = our_cache(engine, None, room)
    setup = Setup(model=str(engine.absolute()), threads=room.threads, context=room.context, options=options)
    log = peers_folder() / "logs"
    return {
        IN_PROCESS: runner(
            Path(sys.executable), f"{PACKAGE}.our_engine", setup, log=log / "door-process.log", environment=WAITING
        ),
        HTTP: our_server(engine, options, threads=room.threads, log=log / "door-http.log"),
        TRITON: _triton(engine, options | {"n_threads": room.threads}),
    }


@contextlib.contextmanager
def _triton(engine: Path, options: dict[str, Any]) -> Iterator[Contender | Refusal]:
    """A repository with the engine's model, and options of its own, in the tritonserver of the tests."""
    from tests.triton_rig.server import ServerError, serving
    from tests.triton_rig.set_up import reason_not_to, set_up

    if (reason := reason_not_to()) is not None:
        yield Refusal(why=reason)
        return
    with tempfile.TemporaryDirectory(prefix="trt-kv-triton-") as scratch, contextlib.ExitStack() as held:
        folder = Path(scratch)
        write_repository(folder, MODEL, is_for_gpus=False)
        model_file = folder / FOLDER / MODEL / VERSION / "model.json"
        model_file.write_text(json.dumps({"engine": str(engine.resolve()), **options}))
        try:
            started = held.enter_context(serving([folder / FOLDER], set_up(), folder))
        except (ServerError, subprocess.CalledProcessError) as error:
            yield Refusal(why=str(error)[-400:])
            return
        yield AtDoor(process=started.process.pid, door=triton_door(started.http_port, MODEL), facts=options)

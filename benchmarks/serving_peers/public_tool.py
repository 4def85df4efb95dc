"""A load by a tool that is not ours: NVIDIA's aiperf, from PyPI, in an environment of its own, against ``trt-kv serve``."""

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, begun_document, busy_seconds_of_others
from benchmarks.peers.environments import peers_folder, python_of
from benchmarks.peers.protocol import Refusal
from benchmarks.peers.rows import FULL, INT4
from benchmarks.peers.subjects import engine_for, smollm2
from benchmarks.serving_peers.contenders import AtDoor
from benchmarks.serving_peers.rows import Room, our_cache, our_server
from trt_kv.json_file import read_json

SECONDS = 600
REPORT = "profile_export_aiperf.json"
N_CLIENTS, N_REQUESTS, N_PROMPT, N_TOKENS = 8, 32, 128, 32


def measure_with_aiperf(*, threads: int) -> dict[str, Any]:
    """A document with its report: chats of synthetic text, streamed, over the loopback interface.

    ``BenchmarkError`` if the server does not start or the tool fails.
    """
    subject = smollm2()
    engine = engine_for(subject, FULL | INT4)
    room = Room(n_sequences=N_CLIENTS, n_prompt=2 * N_PROMPT, n_tokens=N_TOKENS, threads=threads)
    tool = python_of("aiperf").with_name("aiperf")
    options = our_cache(engine, None, room) | {"model_name": subject.name}
    began, busy = time.perf_counter(), busy_seconds_of_others()
    with (
        our_server(engine, options, threads=threads, log=peers_folder() / "logs" / "serving-aiperf.log") as started,
        tempfile.TemporaryDirectory(prefix="trt-kv-aiperf-") as scratch,
    ):
        if isinstance(started, Refusal):
            raise BenchmarkError("the server does not start", got=started.why)
        assert isinstance(started, AtDoor)
        words = _words(started.door.port, subject.name, subject.folder.resolve())
        _run([str(tool), *words, "--artifact-dir", scratch])
        report: dict[str, Any] = read_json(Path(scratch) / REPORT, kind="report of aiperf", error=BenchmarkError)
    metrics = {name: values for name, values in report.items() if isinstance(values, dict) and "unit" in values}
    settings = {"tool": f"aiperf {report['aiperf_version']}", "clients": N_CLIENTS, "requests": N_REQUESTS, "threads": threads}
    document = begun_document("trt-kv serve under the load of a public tool", settings | {"engine": engine.name})
    elapsed_s = time.perf_counter() - began
    document["machine"]["cores_used_by_others"] = round(max(0.0, (busy_seconds_of_others() - busy) / elapsed_s), 2)
    return document | {"elapsed_s": round(elapsed_s, 1), "errors": report["error_summary"], "report": metrics}


def _words(port: int, model: str, tokenizer: Path) -> list[str]:
    """Every request another prompt, and answers of one length."""
    options = {
        "model": model,
        "url": f"http://127.0.0.1:{port}",
        "endpoint-type": "chat",
        "tokenizer": str(tokenizer),
        "isl": N_PROMPT,
        "osl": N_TOKENS,
        "concurrency": N_CLIENTS,
        "request-count": N_REQUESTS,
        "warmup-request-count": 2,
        "extra-inputs": "ignore_eos:true",
        "random-seed": 1,
        "ui": "none",
    }
    return ["profile", "--streaming", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        raise BenchmarkError("aiperf failed", got=done.stdout.strip()[-600:])

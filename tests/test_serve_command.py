"""``trt-kv serve`` as a process: it says where it listens, logs without text, drains at a signal and writes its timeline."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.chat_engines import chat_engine
from tests.engines import Run
from tests.http_server import eventually


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_engine(tmp_path_factory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_server_begins_and_ends(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, "-m", "trt_kv", "serve", str(folder), "--port", "0", "--threads", "1"]
    command += ["--cache-tokens", "4000", "--model-name", "mine", "--trace", str(trace)]
    said = tmp_path / "stderr"
    with said.open("w") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        assert eventually(lambda: '"started"' in said.read_text() or process.poll() is not None, 60), said.read_text()
        found = re.match(r"mine at (http://127\.0\.0\.1:\d+)/v1, chat page at \1\n", said.read_text())
        assert found is not None, said.read_text()
        body = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 8, "model": "mine"}
        answer = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    rest = said.read_text().partition("\n")[2]
    *lines, last = rest.splitlines()
    assert last.startswith("[trace:")
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["started", "generated", "request", "stopping", "stopped"]
    generated, request = events[1:3]
    assert generated["request_id"] == request["request_id"] == answer.headers["x-request-id"]
    assert (generated["generated_tokens"], request["status"]) == (answer.json()["usage"]["completion_tokens"], 200)
    assert "secret" not in rest
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "bad port"),
        (["--host", "no.such.host.invalid"], "no such address"),
        (["--max-queue", "0"], "bad max_queue"),
        (["--api-key", " "], "bad api_key"),
        (["--trace", "/"], "--trace"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_server_that_cannot_be_started_says_why(folder: Path, run: Run, options: list[str], said: str) -> None:
    code, _, err = run("serve", folder, "--cache-tokens", "500", "--threads", "1", *options)
    assert code == 2
    assert said in err

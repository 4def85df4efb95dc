"""The benchmark of servers: clients count and time what is sent, memory is equal, runs can be resumed, aims are judged."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.harness import BenchmarkError, begun_document, save
from benchmarks.peers.protocol import Refusal
from benchmarks.peers.subjects import SUBJECTS
from benchmarks.serving_peers import __main__ as command
from benchmarks.serving_peers import measure
from benchmarks.serving_peers.clients import ask, openai_door, triton_door
from benchmarks.serving_peers.contenders import server
from benchmarks.serving_peers.loads import Load, Reply, Served, closed_loop
from benchmarks.serving_peers.loads_by_others import AIPERF_FILE, SOAK_FILE, lines_of
from benchmarks.serving_peers.page import section
from benchmarks.serving_peers.plan import CONCURRENCY, DOORS, IN_PROCESS, MEMORY, TRITON, Plan
from benchmarks.serving_peers.prompts import Prompt, facts_in_prose, prose
from benchmarks.serving_peers.results import targets_of
from benchmarks.serving_peers.rows import ROWS, Room, Row, our_cache
from benchmarks.serving_peers.samples import OUT_OF_TIME, key_of, summary
from tests.chat_engines import chat_engine
from tests.engines import random_ids
from tests.http_server import served
from trt_kv.runtime.engine import Engine

OURS, RIVAL, WEAK = "trt-kv pooledwindow 20 %, int8 cache", "OpenVINO GenAI", "OpenVINO GenAI, its eviction to 20 %"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_engine(tmp_path_factory)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A token for each byte."""
    found = Tokenizer(models.BPE(vocab={one: at for at, one in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return found


def test_a_closed_loop_sends_the_next_request_when_one_is_answered() -> None:
    running: dict[int, int] = {}
    most = []

    def step() -> list[tuple[int, list[int]]]:
        most.append(len(running))
        found = []
        for at in list(running):
            running[at] += 1
            found.append((at, [100 + at]))
            if running[at] == at + 2:
                found[-1] = (at, [100 + at] * (3 - at))  # the last ones of a request may come together
                del running[at]
        return found

    done = closed_loop(Load(prompts=[[1], [2], [3]], n_tokens=3, n_clients=2), lambda at: running.update({at: 0}), step)
    assert [len(reply.token_s) for reply in done.replies[:1]] == [done.replies[0].n_tokens]
    assert max(most) == 2
    assert done.replies[2].sent_s >= min(done.replies[0].token_s[-1], done.replies[1].token_s[-1])
    assert done.replies[1].token_ids == [101] * done.replies[1].n_tokens


@pytest.mark.usefixtures("one_thread")
def test_clients_get_the_texts_of_the_engine_and_times_of_their_tokens(folder: Path) -> None:
    with served(folder) as started, Engine.load(folder, cache_tokens=4000, chunk=16, n_threads=1) as alone:
        prompts = [random_ids(alone, n, seed=n) for n in (5, 23, 40)]
        port = int(started.url.rsplit(":", 1)[1])
        found = ask(openai_door(port), Load(prompts=prompts, n_tokens=7, n_clients=2), within_s=60).replies
        texts = [alone.generate(prompt, max_new_tokens=7, temperature=0.0, ignore_eos=True).text for prompt in prompts]
        assert [reply.text for reply in found] == texts
        assert [(reply.n_tokens, reply.why) for reply in found] == [(7, "")] * 3
        assert all(reply.sent_s < reply.token_s[0] <= reply.token_s[-1] for reply in found)
        refused = ask(openai_door(port), Load(prompts=[[10**9]], n_tokens=7, n_clients=1), within_s=60).replies
        assert refused[0].why.startswith("400")
        assert "prompt" in refused[0].why


SAYS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for text in ("a", "bc"):
            self.wfile.write(b'data: {"text_output": "%s", "num_output_tokens": %d}\\n\\n' % (text.encode(), len(text)))
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"serving at http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def test_a_server_is_found_where_it_says_and_its_tokens_are_counted(tmp_path: Path) -> None:
    with server(
        [sys.executable, "-c", SAYS], lambda port: triton_door(port, "m"), {}, log=tmp_path / "log", environment={}
    ) as started:
        assert not isinstance(started, Refusal)
        for n_tokens, why in ((3, ""), (4, "it answered with 3 tokens in place of 4")):
            outcome = started.serve(Load(prompts=[[1]], n_tokens=n_tokens, n_clients=1), within_s=30)
            assert not isinstance(outcome, Refusal)
            assert [(one.text, one.n_tokens, one.why) for one in outcome[0].replies] == [("abc", 3, why)]
            assert outcome[1] > 2**20


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    dies = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with server(dies, openai_door, {}, log=tmp_path / "log", environment={}) as started:
        assert started == Refusal(why="it ended with 1: no such model")


@pytest.mark.parametrize("dtype", ["int8", None])
def test_our_cache_takes_the_bytes_that_everybody_has(small_folder: Path, dtype: str | None) -> None:
    room = Room(n_sequences=3, n_prompt=100, n_tokens=20, threads=1, cache_bytes=700_000)
    with Engine.load(small_folder, n_threads=1, **our_cache(small_folder, dtype, room)) as engine:
        pool = engine.runner.pool
        taken = pool.kv.nbytes + pool.token_positions.nbytes + pool.scores.nbytes
        assert 0.9 * 700_000 < taken <= 700_000


def test_prompts_differ_from_their_beginning_on_and_ask_for_what_is_in_them(tokenizer: Tokenizer) -> None:
    asked = facts_in_prose(tokenizer, 6, n_tokens=900, seed=0)
    plain = prose(tokenizer, 6, n_tokens=900, seed=0)
    assert len({tuple(prompt.token_ids[:60]) for prompt in (*asked, *plain)}) > 10
    assert {len(prompt.token_ids) for prompt in plain} == {900}
    for prompt in asked:
        text = tokenizer.decode(prompt.token_ids)
        assert prompt.answer is not None
        fact = f"{text[text.rindex('The code') :]} {prompt.answer}."
        assert text.count(fact) == 1
        assert 600 < len(prompt.token_ids) <= 900
    assert facts_in_prose(tokenizer, 6, n_tokens=900, seed=0) == asked


def reply(*token_s: float, sent_s: float = 0.0, text: str = "") -> Reply:
    return Reply(sent_s=sent_s, token_s=list(token_s), n_tokens=len(token_s), text=text)


def test_a_load_becomes_throughput_percentiles_and_right_answers() -> None:
    replies = [reply(1.0, 2.0, 4.0, text=" 1234."), reply(3.0, 3.5, sent_s=1.0, text=" 1243."), reply(5.0, 8.0, sent_s=4.0)]
    prompts = [Prompt(token_ids=[1, 2], answer="1234"), Prompt(token_ids=[3], answer="1234"), Prompt(token_ids=[4])]
    found = summary(replies, prompts)
    assert (found["seconds"], found["tokens_per_s"], found["requests_per_s"]) == (8.0, 0.875, 0.375)
    assert (found["right"], found["asked"], found["at_once"], found["prompt_tokens"]) == (1, 2, 2, 4)
    assert found["first_token_s"]["p50"] == 1.0
    assert found["between_tokens_ms"]["p50"] == 1500.0
    replies[1].why = "503: full"
    assert summary(replies, prompts) == {"why": "1 of 3 requests: 503: full"}


def sample(part: str, row: str, clients: int = 16, index: int = 0, **found: Any) -> dict[str, Any]:
    numbers = {
        "requests": 1,
        "seconds": 1.0,
        "tokens_per_s": 1.0,
        "requests_per_s": 1.0,
        "at_once": 1,
        "asked": 16,
        "right": 16,
    }
    times = {"first_token_s": {"p50": 1.0, "p95": 1.0}, "between_tokens_ms": {"p50": 1.0, "p95": 1.0, "p99": 1.0}}
    return key_of(part, row, clients, index) | numbers | times | {"peak_mib": 1, "facts": {}} | found


def test_aims_are_judged_by_the_best_rival_and_by_the_best_that_answers_as_well() -> None:
    samples = [
        sample(MEMORY, OURS, tokens_per_s=30.0, right=15),
        sample(MEMORY, RIVAL, tokens_per_s=10.0, right=15),
        sample(MEMORY, WEAK, tokens_per_s=40.0, right=3),
        *(sample(DOORS, IN_PROCESS, index=at, seconds=seconds) for at, seconds in enumerate((1.0, 2.0, 4.0))),
        *(sample(DOORS, TRITON, index=at, seconds=seconds) for at, seconds in enumerate((1.02, 1.9, 4.4))),
    ]
    found = [(target.measured, target.is_met) for target in targets_of(samples)]
    assert found == [(1.33, False), (0.333, True), (1.0, True), (1.02, True)]
    assert targets_of(samples[1:3]) == []


class FakeContender:
    """Answers everything with ``code``; ``asked`` has the sizes of its loads."""

    def __init__(self, asked: list[tuple[int, int]]) -> None:
        self.facts: dict[str, Any] = {}
        self._asked = asked

    def serve(self, load: Load, *, within_s: float) -> tuple[Served, int] | Refusal:
        assert within_s > 0
        self._asked.append((len(load.prompts), load.n_clients))
        return Served(replies=[reply(1.0, 1.5, text=" 7") for _ in load.prompts]), 2**30


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Rows without models, ``RIVAL`` not installed; the sizes of what they are asked."""
    asked: list[tuple[int, int]] = []

    def prepare(_: object) -> Any:
        @contextlib.contextmanager
        def start(room: Room) -> Iterator[FakeContender]:
            assert room.threads == 1
            yield FakeContender(asked)

        return start

    def missing(_: object) -> Any:
        raise BenchmarkError("it cannot be installed", got="no network")

    for name in ROWS:
        monkeypatch.setitem(ROWS, name, Row(name=name, cache="int8", prepare=missing if name == RIVAL else prepare))
    monkeypatch.setattr(measure, "doors_of", lambda *_: {name: prepare(None)(room_of_one()) for name in (IN_PROCESS, TRITON)})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for model in ("smollm2", "tiny"):
        monkeypatch.setitem(SUBJECTS, model, lambda: SimpleNamespace(folder=tmp_path))
    return asked


def room_of_one() -> Room:
    return Room(n_sequences=1, n_prompt=1, n_tokens=1, threads=1)


def measured(tmp_path: Path, *words: str) -> dict[str, Any]:
    options = ["--sizes", "tiny", "--threads", "1", "--row", OURS, "--row", RIVAL, "--out", str(tmp_path), *words]
    outcome = click.testing.CliRunner().invoke(command.main, options, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    document: dict[str, Any] = json.loads((tmp_path / command.FILE).read_text())
    return document


def reasons(document: dict[str, Any]) -> list[str]:
    return [sample["why"] for sample in document["samples"] if "why" in sample]


def test_a_run_measures_once_and_tells_what_it_could_not(fakes: list[tuple[int, int]], tmp_path: Path) -> None:
    hurried = measured(tmp_path, "--minutes", "-1")
    assert reasons(hurried).count(OUT_OF_TIME) == 5
    assert f"* 5 loads: {OUT_OF_TIME}" in section(hurried)
    del fakes[:]
    document = measured(tmp_path, "--resume")
    warm_up, memory = (2, 2), (3, 3)
    assert fakes == [warm_up, memory, warm_up, (1, 1), (2, 2), warm_up, warm_up, (2, 2), (2, 2)]
    assert all("no network" in why for why in reasons(document))
    again = measured(tmp_path, "--resume")
    assert len(fakes) == 9
    assert again["samples"] == document["samples"]
    text = section(document)
    assert "| trt-kv pooledwindow 20 %, int8 cache | int8 | 4.0 |" in text
    assert f"{MEMORY}, {RIVAL}, 3 clients: it cannot be installed" in text


def test_another_model_has_a_file_and_a_section_of_its_own(fakes: list[tuple[int, int]], tmp_path: Path) -> None:
    document = measured(tmp_path)
    measured(tmp_path, "--model", "tiny")
    other = json.loads((tmp_path / "serving_peers_tiny.json").read_text())
    assert {sample["part"] for sample in other["samples"]} == {CONCURRENCY}
    text = section(document, more=[other])
    assert "### A tiny shape, random weights\n" in text
    refused = click.testing.CliRunner().invoke(command.main, ["--model", "tiny", "--part", "memory"])
    assert refused.exit_code == 2
    assert "expected concurrency with --model tiny" in refused.output


def test_answers_without_text_have_throughput_alone() -> None:
    silent = Reply(sent_s=0.5, n_tokens=4, ended_s=2.0)
    found = summary([reply(1.0, 1.5), silent], [Prompt(token_ids=[1]), Prompt(token_ids=[2])])
    assert found["seconds"] == 2.0
    assert found["first_token_s"] == {"p50": None, "p95": None}


def test_the_page_tells_of_loads_by_others(tmp_path: Path) -> None:
    assert lines_of(tmp_path) == []
    percentiles = {"unit": "ms", "avg": 3.0, "p50": 2000.0, "p95": 4000.0}
    names = ("time_to_first_token", "inter_token_latency", "output_token_throughput", "request_throughput")
    settings = {"tool": "aiperf 1", "clients": 2, "requests": 5}
    of_aiperf = begun_document("a", settings) | {"errors": [], "report": dict.fromkeys(names, percentiles)}
    silences = [{"memory_mb": mb, "n_threads": 3, "n_files": 4} for mb in (90.0, 10.0, 12.0)]
    servers = {"http": {"answers": {"left": 6}, "silences": silences}}
    of_soak = begun_document("b", {"minutes": 10.0, "warm_up_rounds": 1}) | {"servers": servers, "faults": ["f"]}
    save(of_aiperf, tmp_path / AIPERF_FILE)
    save(of_soak, tmp_path / SOAK_FILE)
    first, second = lines_of(tmp_path)
    assert "5 chats by 2 clients, 0 errors, 3.0 tokens/s" in first
    assert "first token 2.0 s (95th percentile 4.0), between tokens 2000.0 ms" in first
    assert "10 minutes, 1 faults. http: 6 left; 10.0 MiB after the warm-up, 12.0 at the end" in second


def test_what_is_continued_has_the_same_sizes(fakes: list[tuple[int, int]], tmp_path: Path) -> None:
    measured(tmp_path, "--part", CONCURRENCY)
    words = ["--resume", "--short", "--out", str(tmp_path)]
    outcome = click.testing.CliRunner().invoke(command.main, words)
    assert outcome.exit_code == 2
    assert "has sizes tiny" in outcome.output
    assert fakes


def test_a_plan_chooses_rows_in_the_order_of_its_sizes() -> None:
    plan = Plan(sizes="tiny", rows=(RIVAL, OURS), threads=1, minutes=1.0)
    chosen: Sequence[str] = plan.chosen(plan.of.rows)
    assert chosen == [OURS, RIVAL]

"""What Triton's model does when something goes wrong, with a stand-in for Triton: each request gets one final response."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.engines import assert_nothing_leaked
from tests.http_server import eventually
from trt_kv.errors import UsageError
from trt_kv.export.triton_repository import FOLDER, write_repository
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.engine import Engine
from trt_kv.serving.triton.options import ModelOptions
from trt_kv.serving.triton.service import Service
from trt_kv.serving.triton.tensors import complete_config

FINAL = 1
PROMPT = {"text_input": np.array([[b"the old storm"]], np.object_)}


@dataclass
class Sender:
    """A client: ``before_send`` may raise, and ``gone`` makes it one that has left."""

    sent: list[tuple[Any, int]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    before_send: Callable[[], None] = lambda: None
    gone: bool = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "a response after the final one"
        if response.error is None:
            self.before_send()
        self.sent.append((response, flags))
        if flags == FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.gone

    @property
    def error(self) -> tuple[str, str] | None:
        """Code and message of the final response, if it is an error."""
        assert self.ended.wait(30)
        error: tuple[str, str] | None = self.sent[-1][0].error
        return error


class Family:
    """A metric family that keeps nothing."""

    COUNTER, GAUGE = range(2)

    def __init__(self, **_: Any) -> None:
        self.Metric = lambda **_: SimpleNamespace(set=_ignore, increment=_increase)


def _ignore(value: float) -> None:
    pass


def _increase(value: float) -> None:
    assert value > 0, "counters only grow"


BACKEND = SimpleNamespace(
    Tensor=lambda name, array: (name, array),
    InferenceResponse=lambda tensors=(), error=None: SimpleNamespace(tensors=dict(tensors), error=error),
    TritonError=type(
        "TritonError",
        (),
        {"__new__": lambda _, text, code: (code, text)}
        | {code: code for code in ("INTERNAL", "INVALID_ARG", "CANCELLED", "UNAVAILABLE")},
    ),
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    MetricFamily=Family,
)


def request(sender: Sender, tensors: Mapping[str, Any]) -> Any:
    """A request of Triton."""

    def inputs() -> list[Any]:
        return [
            SimpleNamespace(name=lambda n=name: n, as_numpy=lambda a=array: np.asarray(a)) for name, array in tensors.items()
        ]

    return SimpleNamespace(
        get_response_sender=lambda: sender,
        request_id=lambda: "",
        parameters=lambda: "{}",
        timeout=lambda: 0,
        inputs=inputs,
    )


@pytest.fixture
def service(small_folder: Path) -> Iterator[Service]:
    engine = Engine.load(small_folder, cache_tokens=2000, chunk=16, n_threads=1)
    made = Service(AsyncEngine(engine), ModelOptions(engine="", drain_seconds=20), BACKEND, model_name="m")
    yield made
    if made.is_ready:
        made.close()
    assert_nothing_leaked(engine)


def asked(service: Service, sender: Sender, **tensors: Any) -> Sender:
    service.take(request(sender, PROMPT | {"max_tokens": [[6]]} | tensors))
    return sender


def test_the_end_waits_for_requests_that_run_and_takes_no_more(service: Service, small_engine: Engine) -> None:
    senders = [asked(service, Sender(), max_tokens=[[40]]) for _ in range(3)]
    assert eventually(lambda: service._admission.n_inside == 3)
    service.close()
    alone = small_engine.generate("the old storm", max_new_tokens=40)
    for sender in senders:
        assert sender.error is None
        assert sender.sent[-1][0].tensors["text_output"].tolist() == [alone.text.encode()]
    assert not service.is_ready
    assert eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("trt-kv")])


def test_requests_that_are_not_done_in_time_get_an_error(small_folder: Path) -> None:
    engine = Engine.load(small_folder, cache_tokens=2000, chunk=16, n_threads=1)
    service = Service(AsyncEngine(engine), ModelOptions(engine="", drain_seconds=0), BACKEND, model_name="m")
    slow_down(service)
    sender = asked(service, Sender(), max_tokens=[[100]], stream=[[True]])
    assert eventually(lambda: bool(sender.sent))
    service.close()
    assert sender.error is not None
    assert sender.error[0] == "UNAVAILABLE"
    assert_nothing_leaked(engine)


def test_a_client_that_has_gone_frees_its_pages_and_disturbs_nobody(service: Service, small_engine: Engine) -> None:
    slow_down(service)
    gone = asked(service, Sender(), max_tokens=[[100]], stream=[[True]])
    other = asked(service, Sender())
    assert eventually(lambda: bool(gone.sent))
    gone.gone = True
    assert gone.error is not None
    assert gone.error[0] == "CANCELLED"
    assert other.error is None
    alone = small_engine.generate("the old storm", max_new_tokens=6)
    assert other.sent[-1][0].tensors["text_output"].tolist() == [alone.text.encode()]
    pool = service.engine.engine.runner.pool
    assert eventually(lambda: pool.n_free == pool.n_pages)


def test_whatever_fails_ends_the_request_and_no_other(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a broken pipe")

    good = asked(service, Sender(), max_tokens=[[30]])
    unsent = asked(service, Sender(before_send=broken), stream=[[True]])
    assert unsent.error == ("INTERNAL", "a broken pipe")
    unread = Sender()
    torn = request(unread, PROMPT)
    torn.inputs = broken
    service.take(torn)
    assert unread.error == ("INTERNAL", "a broken pipe")
    wrong = asked(service, Sender(), temperature=np.array([[np.nan]], np.float32))
    assert wrong.error is not None
    assert wrong.error[0] == "INVALID_ARG"
    assert good.error is None

    monkeypatch.setattr(service.engine.engine.runner, "run", lambda _: broken())
    assert asked(service, Sender()).error == ("INTERNAL", "a broken pipe")
    monkeypatch.undo()
    assert asked(service, Sender()).error is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_ended_is_not_ready_and_leaves_nobody_waiting(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.is_ready

    def fall() -> None:
        raise SystemExit

    monkeypatch.setattr(service.engine.engine.core, "run_until_idle", fall)
    sender = asked(service, Sender())
    assert sender.error is not None
    assert sender.error[0] == "UNAVAILABLE"
    assert "the engine has stopped" in sender.error[1]
    assert not service.is_ready
    service.close()


def test_salts_keep_prefixes_apart(service: Service) -> None:
    prompt = np.array([[3 + at % 50 for at in range(100)]], np.int32)
    hits = []
    for salt in ("a", "a", "b", "a"):
        service.take(
            request(sender := Sender(), {"input_ids": prompt, "max_tokens": [[1]], "sampling_parameters": _json(salt)})
        )
        assert sender.error is None
        hits.append(service.engine.engine.statistics["prefix_cache"]["hit_tokens"])
    assert hits == [0, 80, 80, 160]
    service.take(request(sender := Sender(), PROMPT | {"sampling_parameters": _json(7)}))
    assert sender.error is not None
    assert "cache_salt" in sender.error[1]


def _json(salt: Any) -> Any:
    return np.array([[json.dumps({"cache_salt": salt}).encode()]], np.object_)


def test_options_are_read_strictly_and_place_an_engine_on_tritons_gpu(small_folder: Path, tmp_path: Path) -> None:
    (model,) = (small_folder / FOLDER).iterdir()
    options = ModelOptions.read(model / "1")
    assert options.engine_folder(model / "1") == small_folder.resolve()
    assert options.load_options(model / "1", gpu=None) == {"verify": True, "model_defaults": True}
    assert options.load_options(model / "1", gpu=3)["device"] == "cuda:3"
    (tmp_path / "model.json").write_text('{"engine": "x", "cache_token": 4}')
    with pytest.raises(UsageError, match="unknown fields"):
        ModelOptions.read(tmp_path)
    with pytest.raises(UsageError, match="bad drain_seconds"):
        ModelOptions(engine="x", drain_seconds=-1.0)


def test_engines_for_gpus_are_placed_on_gpus_and_names_are_those_that_triton_takes(tmp_path: Path) -> None:
    write_repository(tmp_path, "some org/Model 1.5-full", is_for_gpus=True)
    (model,) = (tmp_path / FOLDER).iterdir()
    assert model.name == "some-org-Model-1.5-full"
    kinds = {path.name: "KIND_GPU" in path.read_text() for path in model.rglob("*.pbtxt")}
    assert kinds == {"config.pbtxt": True, "vllm.pbtxt": True, "gpu.pbtxt": True, "cpu.pbtxt": False}


@pytest.mark.parametrize(("parameters", "dims"), [({}, [1, 1]), ({"batch_dimension": {"string_value": "false"}}, [1])])
def test_inputs_have_the_dimensions_that_the_configuration_asks_for(parameters: dict[str, Any], dims: list[int]) -> None:
    found: dict[str, Any] = {}
    config = SimpleNamespace(
        as_dict=lambda: {"parameters": parameters},
        set_max_batch_size=lambda size: found.update(batch=size),
        set_model_transaction_policy=lambda policy: found.update(policy=policy),
        add_input=lambda one: found.update({one["name"]: one}),
        add_output=lambda one: found.update({one["name"]: one}),
    )
    complete_config(config)
    assert (found["batch"], found["policy"]) == (0, {"decoupled": True})
    assert found["text_input"] == {"name": "text_input", "data_type": "TYPE_STRING", "dims": dims, "optional": True}
    assert found["text_output"]["dims"] == [-1]


def slow_down(service: Service) -> None:
    """Every step takes 20 ms more."""
    runner = service.engine.engine.runner
    run = runner.run

    def run_slowly(plan: Any) -> Any:
        time.sleep(0.02)
        return run(plan)

    runner.run = run_slowly  # type: ignore[method-assign]

"""What the report of a real model promises, measured on the bundled one: engines' answers, fair comparisons, every number."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.quality import __main__ as report
from benchmarks.quality.real import calibrating, command, plans
from benchmarks.quality.real.answering import PAGE_SIZE, Answerer
from benchmarks.quality.real.asking import Asker
from benchmarks.quality.real.clock import Clock
from benchmarks.quality.real.contenders import HOST, contenders
from benchmarks.quality.real.families import Family, families, synthetic_families
from benchmarks.quality.real.haystack import prose
from benchmarks.quality.real.items import Item, fitted
from benchmarks.quality.real.marking import mark, records_found, share_found
from benchmarks.quality.real.page import page_with_table, real_markdown, write_real_report
from benchmarks.quality.real.results import MarkCell, MarkRow, RealResults
from benchmarks.quality.real.run import PAGE
from benchmarks.quality.real.settings import LengthPlan, RealSettings
from benchmarks.quality.real.statistics import Marks
from benchmarks.quality.recall.harness import RecallHarness
from benchmarks.quality.recall.steps import Movement
from benchmarks.quality.recipes import Recipes
from trt_kv.errors import ReportError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.engine import Engine

LENGTHS = (512, 1024, 2048)
THRESHOLD = [name for name in policy_names() if policy_from_name(name).budget == "above"]
"""Their budgets are those of the calibration's prompts, from which other ones differ."""


def encode(text: str) -> list[int]:
    """About a token per four characters."""
    return [0] * (-(-len(text) // 4))


@pytest.fixture(scope="module")
def quick(full_folder: Path, bundled_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> RealResults:
    return _measured(full_folder, bundled_checkpoint, tmp_path_factory.mktemp("real") / "parts", [])


def _measured(
    folder: Path,
    checkpoint: Checkpoint,
    parts: Path,
    told: list[str],
    minutes: float | None = None,
    settings: RealSettings = plans.QUICK,
    known: RealResults | None = None,
) -> RealResults:
    return command.results_of_engine(
        checkpoint,
        folder,
        synthetic_families(),
        settings,
        folder=parts,
        clock=Clock(minutes=minutes),
        command="a test",
        tell=told.append,
        known=known,
    )


@pytest.mark.slow
def test_every_policy_is_measured_in_every_mode_that_the_model_can_do(quick: RealResults) -> None:
    known = {contender.facts.name for contender in contenders()}
    for mode in ("aware", "agnostic"):
        cells = quick.compared(mode, quick.settings.main.n_tokens)
        assert {cell.family for cell in cells} == {"synthetic", "synthetic_many"}
        for cell in cells:
            assert {row.policy for row in cell.rows} == known
            for row in cell.rows:
                if row.budget is not None and row.policy not in (*HOST, *THRESHOLD):
                    assert row.mean_kept == pytest.approx(row.budget, abs=0.05), row.name
                    assert max(row.kv_bytes) < min(cell.full.kv_bytes), row.name
            assert all(bytes_ == full for bytes_, full in zip(_row(cell, "freekv").kv_bytes, cell.full.kv_bytes, strict=True))


@pytest.mark.slow
def test_what_the_model_cannot_do_is_not_compared(quick: RealResults) -> None:
    assert "niah_single_2" in {cell.family for cell in quick.tried}
    assert "niah_single_2" not in {cell.family for cell in quick.cells}
    assert "left out" in real_markdown(quick)


@pytest.mark.slow
def test_a_step_attends_to_its_share_and_pages_are_moved(quick: RealResults) -> None:
    cell = quick.compared("agnostic", quick.settings.main.n_tokens)[0]
    row = _row(cell, "quest")
    assert row.mean_kept == pytest.approx(0.25, abs=0.08)
    assert min(row.moved_bytes) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", HOST)
def test_pages_are_recalled_as_if_the_policy_had_read_the_prompt(name: str, full_folder: Path) -> None:
    """The prompt is read once for all policies; RecallHarness, which engines are compared with, reads it for these alone."""
    plan = next(of for of in contenders() if of.facts.name == name).plan(Recipes(facts=()), 0.25, lots=0)
    with Engine.load(full_folder, prefix_cache=False, cache_tokens=64) as engine:
        steps, config = engine.runner._executor, engine.manifest.config
        assert isinstance(steps, SplitStepExecutor)
        answerer, asker = Answerer(steps.dense, config, longest=500), Asker(engine.tokenizer, config.eos_token_ids)
        (item,) = synthetic_families()[1].items(asker.encode, 420, 0)
        question = dataclasses.replace(asker.question(item, "agnostic"), n_new=12, ends=lambda _: False)
        (answered,) = answerer.answers(question, [plan])
        pool = HostKvPool(
            n_pages=config.n_layers * 80,
            page_size=PAGE_SIZE,
            n_kv_heads=config.n_kv_heads,
            head_size=config.head_dim,
            n_query_heads=config.n_heads,
        )
        alone = RecallHarness(steps.dense, pool, plan.policy, n_layers=config.n_layers, scale=config.scale)
        whole = alone.runner.new_sequence()
        logits = alone.runner.prefill(whole, question.prompt)
        fork = alone.forked(whole, plan)
        alone.steps.programs = [alone.program(plan, "decode")]
        alone.steps.movements = [Movement(config.n_layers, config.n_kv_heads)]
        said: list[int] = []
        for at in range(len(question.given) + question.n_new):
            token = question.given[at] if at < len(question.given) else int(logits.argmax())
            said += [] if at < len(question.given) else [token]
            logits = alone.runner.decode([fork], [token])[0]
        assert tuple(said) == answered.tokens
        moved = alone.steps.movements[0]
        assert answered.moved_bytes == pytest.approx((moved.ahead + moved.late) * alone.page_head_bytes, rel=0.2)


@pytest.mark.slow
def test_a_conversation_on_compressed_tokens_stays_within_its_budget(quick: RealResults) -> None:
    compressed = [row for row in quick.talks if row.mode == "compressed" and row.budget is not None and row.policy != "freekv"]
    held = {row.policy: max(row.most_held) for row in compressed if row.policy not in (*HOST, *THRESHOLD)}
    assert len(held) >= 8
    assert max(held.values()) < 0.5 + 0.05, held


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on_with_its_parts(
    full_folder: Path, bundled_checkpoint: Checkpoint, tmp_path: Path, quick: RealResults
) -> None:
    told: list[str] = []
    nothing = _measured(full_folder, bundled_checkpoint, tmp_path / "none", told, minutes=0.0)
    assert (nothing.cells, nothing.talks, nothing.texts) == ((), (), ())
    assert "can do none" in real_markdown(nothing)
    assert quick.cells


@pytest.mark.slow
@pytest.mark.parametrize("new", ["random", "lukv"])
def test_a_new_policy_is_measured_without_the_others(
    new: str, full_folder: Path, bundled_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipes of the others stay as well, whether it needs one for its KV heads or none."""
    settings = dataclasses.replace(
        plans.QUICK,
        lengths=(LengthPlan(n_tokens=384, n_documents=1, budgets=(0.5,)),),
        n_texts=0,
        talk=dataclasses.replace(plans.QUICK.talk, n_documents=0),
    )
    known = {contender.facts.name: contender for contender in contenders()}

    def cells(parts: str, *names: str) -> tuple[tuple[MarkCell, ...], list[str]]:
        told: list[str] = []
        monkeypatch.setattr(command, "contenders", lambda: [known[name] for name in names])
        found = _measured(full_folder, bundled_checkpoint, tmp_path / parts, told, settings=settings)
        return found.cells, [line for line in told if "-full-" not in line]

    cells("parts", "full", "prefixkv")
    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "calibrated_recipes", lambda *_, **__: pytest.fail("layers are calibrated again"))
        both, told = cells("parts", "full", new, "prefixkv")
    alone, _ = cells("other", "full", new, "prefixkv")
    assert both == alone
    assert told
    assert all(": 1 rows" in line for line in told)


@pytest.mark.slow
def test_what_a_results_file_has_is_not_measured_again(
    quick: RealResults, full_folder: Path, bundled_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    told: list[str] = []
    quick.save(tmp_path / "results.json")
    known = RealResults.load(tmp_path / "results.json")
    assert _measured(full_folder, bundled_checkpoint, tmp_path / "parts", told, known=known) == quick
    assert not told

    def without(cell: MarkCell, policy: str) -> MarkCell:
        return dataclasses.replace(cell, rows=tuple(row for row in cell.rows if row.policy != policy))

    fewer = dataclasses.replace(known, cells=tuple(without(cell, "snapkv") for cell in known.cells))
    assert _measured(full_folder, bundled_checkpoint, tmp_path / "parts", told, known=fewer) == quick
    assert told
    assert all(": 2 rows" in line for line in told), "snapkv at two shares"
    other = dataclasses.replace(known, versions=dataclasses.replace(known.versions, numpy="0"))
    with pytest.raises(ReportError, match="other versions"):
        _measured(full_folder, bundled_checkpoint, tmp_path / "parts", told, known=other)


@pytest.mark.slow
def test_the_report_is_made_from_the_results_alone(quick: RealResults, tmp_path: Path) -> None:
    quick.save(tmp_path / "results.json")
    assert RealResults.load(tmp_path / "results.json") == quick
    page = write_real_report(RealResults.load(tmp_path / "results.json"), tmp_path)
    assert "widewindow" in page.read_text()
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_items_fit_and_hold_what_they_ask_for(family: Family) -> None:
    for n_tokens in LENGTHS[1:]:
        items = family.items(encode, n_tokens, 3)
        assert items == family.items(encode, n_tokens, 3), "drawn anew for every call"
        assert items != family.items(encode, n_tokens, 4)
        for item in items:
            text = item.context + item.said
            n_used = len(encode(text)) + len(encode(item.question + item.prefix)) + item.n_new
            assert 0.7 * n_tokens < n_used <= n_tokens, "as long as it fits"
            if item.marking == "share":
                assert all(reference in text for reference in item.references)


def test_marks() -> None:
    assert share_found(("123", "abc"), "It is 123, not ab.") == 0.5
    gold = tuple(json.dumps({"name": name, "job": "baker", "city": "Oslo"}) for name in ("Anna", "Boris"))
    right = json.dumps([json.loads(of) for of in gold])
    assert records_found(gold, right) == 1.0
    assert records_found(gold, right.replace("Boris", "Carl")) == pytest.approx(1 / 3), "one left out, one invented"
    assert records_found(gold, '[{"name": "Anna", "job": "miller"}]') == pytest.approx((1 - 0.5 - 0.25) / 2)
    assert records_found(gold, '[{"name": "Anna"') == 0.0
    item = Item(document=0, context="", question="", prefix="", references=gold, n_new=1, marking="records")
    assert mark(item, right) == 1.0


def test_the_haystack_reads_as_prose() -> None:
    assert len(prose()) > 400
    assert all(sentence.endswith(".") and "::=" not in sentence for sentence in prose())


def test_a_text_is_fitted_to_its_room() -> None:
    assert fitted(lambda n: "word " * n, encode, 100) == "word " * 80
    with pytest.raises(UsageError, match="too short"):
        fitted(lambda n: "word " * n, encode, 0)


def test_intervals_resample_documents_and_pair_rows() -> None:
    """Ten questions about one document are one document; a difference that is the same in each has no width."""
    marks = Marks((_cell([0.0, 1.0] * 10, [0.25] * 20),))
    assert marks.n_documents == 2
    few = marks.difference(("full", None), ("snapkv", 0.5))
    assert few.value == pytest.approx(0.25)
    assert (few.low, few.high) == (-1.0, 1.0), "two documents tell nothing about others"
    every = Marks((_cell([float(n) / 20 for n in range(20)], [float(n) / 20 for n in range(20)], each=True),))
    same = every.difference(("full", None), ("snapkv", 0.5))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert every.mean(("full", None)).high > every.mean(("full", None)).low


def test_the_rival_holds_no_more_bytes() -> None:
    marks = Marks((_cell([1.0] * 20, [0.5] * 20),))
    assert marks.best_with_no_more_bytes(("full", None), ["snapkv"]) == ("snapkv", 0.5)
    assert marks.best_with_no_more_bytes(("snapkv", 0.5), ["full"]) is None


def test_the_committed_report_is_what_its_results_give() -> None:
    folder = report.COMMITTED / "smollm2"
    results = RealResults.load(folder / "results.json")
    assert (folder / "report.md").read_text() == real_markdown(results)
    assert page_with_table(PAGE.read_text(), results) == PAGE.read_text()


def test_bad_options(tmp_path: Path) -> None:
    for options, message in (
        (["--model", "smollm2", "--recall-only"], "--recall-only"),
        (["--minutes", "3"], "--minutes"),
        (["--model", "smollm2", "--minutes", "-1"], "no time"),
        (["--model", "nothing"], "nothing"),
    ):
        ended = CliRunner().invoke(report.main, [*options, "--out", str(tmp_path)])
        assert ended.exit_code == 2, ended.output
        assert message in ended.output


def _row(cell: MarkCell, policy: str) -> MarkRow:
    return next(row for row in cell.rows if row.policy == policy)


def _cell(full: list[float], other: list[float], *, each: bool = False) -> MarkCell:
    n = len(full)
    ints = (1,) * n
    row = MarkRow(
        policy="full",
        budget=None,
        marks=tuple(full),
        kept=(1.0,) * n,
        kv_bytes=(100,) * n,
        moved_bytes=(0,) * n,
        n_generated=ints,
        fact_kept=(None,) * n,
    )
    less = dataclasses.replace(row, policy="snapkv", budget=0.5, marks=tuple(other), kv_bytes=(50,) * n)
    documents = tuple(range(n)) if each else tuple(int(at >= n // 2) for at in range(n))
    return MarkCell(family="x", mode="aware", n_tokens=8, documents=documents, n_prompt=ints, rows=(row, less))

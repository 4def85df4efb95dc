"""What the report promises: measured as engines run, every number from the results file, and the committed copy current."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from benchmarks import report, report_measure, report_plots, report_text
from benchmarks.report_harness import Harness, Plan, harness_from_engine
from trt_kv.calibration.evaluation import FULL, VARIANTS, Case, case_from_task
from trt_kv.calibration.evaluation_findings import lossless_share, preferred_score
from trt_kv.calibration.evaluation_results import Results
from trt_kv.calibration.tasks import evaluation_tasks, plain_text_tasks
from trt_kv.errors import ReportError
from trt_kv.export.checkpoint import Checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.recipe import Recipe
from trt_kv.runtime.engine import Engine

BY_NAME = {variant.name: variant for variant in (FULL, *VARIANTS)}
PNG_HEAD = b"\x89PNG"


@pytest.fixture(scope="module")
def harness(half_folder: Path) -> Harness:
    """A harness on the pieces of the 50 % engine."""
    return harness_from_engine(half_folder, load_manifest(half_folder), window=32, context_length=512, n_forks=4)


@pytest.fixture(scope="module")
def quick(full_folder: Path, bundled_checkpoint: Checkpoint) -> Results:
    """What ``--quick`` measures."""
    told: list[tuple[str, int, int]] = []
    results = report_measure.measure(
        bundled_checkpoint, full_folder, report_measure.QUICK_SETTINGS, "a test", lambda *event: told.append(event)
    )
    assert {stage for stage, done, total in told if done == total} >= {task.title.lower() for task in results.tasks}
    return results


def _cases(folder: Path) -> list[Case]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tasks = [*evaluation_tasks(3, context_length=512, n_facts=6), *plain_text_tasks(2, context_length=400, answer_length=40)]
    return [case_from_task(task, lambda text: list(tokenizer.encode(text).ids)) for task in tasks]


def test_the_harness_gives_the_tokens_of_a_built_engine(half_folder: Path, harness: Harness) -> None:
    """In one batch with other variants, one token after the other, eviction while decoding included."""
    engine = Engine.load(half_folder, cache_tokens=2048)
    recipes = {"mass": Recipe.load(half_folder / "recipe.json")}
    plans = [
        Plan(variant=BY_NAME[name], share=1.0 if name == "full" else 0.5, recipes=recipes)
        for name in ("full", "prefixkv", "mass-uniform")
    ]
    seen = set()
    for case in _cases(half_folder):
        made = engine.generate(case.prompt, max_new_tokens=40).token_ids
        full, prefixkv, _ = harness.run(dataclasses.replace(case, answer=made), plans)
        assert prefixkv.tokens == made
        assert prefixkv.right
        seen.add(full.tokens == prefixkv.tokens)
    assert seen == {True, False}, "the eviction must show in some documents"


def test_the_full_cache_answers_and_loses_nothing(half_folder: Path, harness: Harness) -> None:
    case = _cases(half_folder)[0]
    (outcome,) = harness.run(case, [Plan(variant=FULL, share=1.0, recipes={})])
    assert outcome.right
    assert outcome.tokens == case.answer
    assert outcome.kept_by_layer == (1.0,) * 8
    assert outcome.fact_kept == outcome.question_kept == 1.0
    assert outcome.kept_place == pytest.approx(0.5)


def test_recency_keeps_sinks_and_the_end_and_lots_follow_their_seed(half_folder: Path, harness: Harness) -> None:
    case = _cases(half_folder)[0]
    n_tokens = len(case.prompt)
    recipes = {"mass": Recipe.load(half_folder / "recipe.json")}
    random_plan = Plan(variant=BY_NAME["random"], share=0.5, recipes=recipes)
    recency, first, again = harness.run(
        case, [Plan(variant=BY_NAME["recency"], share=0.5, recipes={}), random_plan, random_plan], seed=1
    )
    n_kept = n_tokens - round(0.5 * n_tokens)
    kept = [*range(4), *range(n_tokens - n_kept + 4, n_tokens)]
    assert recency.kept_place == pytest.approx(np.mean(kept) / (n_tokens - 1))
    assert recency.question_kept == 1.0
    assert first == again
    assert first != harness.run(case, [random_plan], seed=2)[0]


def test_a_run_gives_all_memory_back_also_when_it_fails(half_folder: Path, harness: Harness) -> None:
    case = _cases(half_folder)[0]
    harness.run(case, [Plan(variant=BY_NAME["mass-uniform"], share=0.5, recipes={})])
    harness.pool.check_integrity([])
    with pytest.raises(KeyError):
        harness.run(case, [Plan(variant=FULL, share=1.0, recipes={}), Plan(variant=VARIANTS[0], share=0.5, recipes={})])
    harness.pool.check_integrity([])


def test_a_quick_report_shows_what_is_certain(quick: Results) -> None:
    """Directions that hold with few short documents: full answers all, more is no worse, the window score beats mass."""
    for task in quick.tasks:
        assert len(task.rows) == 1 + len(VARIANTS) * len(quick.settings.budgets)
        full = task.row("full", 1.0)
        if task.asks:
            assert full.accuracy.value == 1.0
    late = quick.task("late_question")
    window, mass = ([late.row(name, budget) for budget in (0.2, 0.5)] for name in ("window", "prefixkv"))
    assert window[0].accuracy.value > mass[0].accuracy.value
    assert window[1].accuracy.value > mass[1].accuracy.value
    assert window[1].accuracy.value >= window[0].accuracy.value
    assert preferred_score(quick, late) == "window"
    for recipe in quick.recipes:
        assert np.mean(recipe.kept) == pytest.approx(recipe.budget, abs=0.002)
        assert recipe.spread > 1.2
    for row in late.rows:
        assert row.kept_tokens == pytest.approx(row.budget * late.row("full", 1.0).kept_tokens, rel=0.02)
        used = row.kv_bytes / quick.page_bytes * quick.page_size
        assert row.kept_tokens <= used <= row.kept_tokens + 8 * quick.page_size


def test_results_survive_the_file_and_make_the_same_report(quick: Results, tmp_path: Path) -> None:
    quick.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded == quick
    assert report_text.report_markdown(loaded) == report_text.report_markdown(quick)


def test_a_number_that_does_not_follow_from_the_documents_is_refused(quick: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    quick.save(path)
    data = json.loads(path.read_text())
    data["tasks"][0]["rows"][1]["summary"]["accuracy"]["value"] = 0.99
    path.write_text(json.dumps(data))
    with pytest.raises(ReportError, match=r"late_question, prefixkv at 0.2 does not follow"):
        Results.load(path)


@pytest.mark.parametrize("content", ["[]", '{"format": "trt-kv-recipe", "version": 1}', "{"])
def test_a_file_that_holds_no_results_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(report.main, ["--from-results", str(tmp_path / "results.json"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "results" in result.output
    assert not (tmp_path / "out").exists()


def test_the_command_renders_a_report_from_its_results_alone(quick: Results, tmp_path: Path) -> None:
    quick.save(tmp_path / "results.json")
    out = tmp_path / "out"
    result = CliRunner().invoke(report.main, ["--from-results", str(tmp_path / "results.json"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    pictures = {*report_text.PICTURES.values(), report_text.LAYERS_PICTURE, report_text.KEPT_PICTURE}
    assert {path.name for path in out.iterdir()} == pictures | {"results.json", "report.md", "summary.md"}
    assert all((out / name).read_bytes().startswith(PNG_HEAD) for name in pictures)
    text = (out / "report.md").read_text()
    assert all(f"({name})" in text for name in pictures)
    assert (out / "summary.md").read_text().strip() in text
    assert (out / "results.json").read_bytes() == (tmp_path / "results.json").read_bytes()


def test_lossless_means_from_there_on(quick: Results) -> None:
    """A share counts only if no larger one is clearly worse than the full cache."""
    late = quick.task("late_question")
    right, wrong = "1" * len(late.documents), "0" * len(late.documents)

    def with_answers(at_20: str, at_50: str) -> Results:
        answers = {0.2: at_20, 0.5: at_50}
        rows = tuple(
            dataclasses.replace(row, right=answers[row.budget]) if row.variant == "window" else row for row in late.rows
        )
        return dataclasses.replace(quick, tasks=(dataclasses.replace(late, rows=rows), *quick.tasks[1:]))

    for (at_20, at_50), share in {
        (right, right): 0.2, (wrong, right): 0.5, (right, wrong): None, (wrong, wrong): None
    }.items():  # fmt: skip
        results = with_answers(at_20, at_50)
        assert lossless_share(results, results.tasks[0], "window") == share


def test_the_readme_takes_the_summary_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter"
    assert report.readme_with_summary(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter"
    for broken in ("none", f"{report.END}\n{report.BEGIN}", f"{text}\n{report.BEGIN}"):
        with pytest.raises(ReportError, match="no place"):
            report.readme_with_summary(broken, "new")


def test_the_committed_report_is_what_its_results_give() -> None:
    results = Results.load(report.COMMITTED / "results.json")
    assert results.settings == report_measure.FULL_SETTINGS
    assert (report.COMMITTED / "report.md").read_text() == report_text.report_markdown(results)
    summary = report_text.summary_markdown(results)
    assert (report.COMMITTED / "summary.md").read_text() == summary + "\n"
    assert report.README.read_text() == report.readme_with_summary(report.README.read_text(), summary)
    assert {path.name for path in report.COMMITTED.glob("*.png")} == set(report_plots.pictures(results))

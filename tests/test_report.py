"""What the report promises: robust directions, every number from the results file, no cell measured twice, a current copy."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import report, report_plots, report_recall_plots, report_recall_text, report_text
from benchmarks.report_harness import Harness
from benchmarks.report_policies import PUBLISHED, contenders
from benchmarks.report_recall_results import RecallResults
from benchmarks.report_settings import FULL_HOST_PLANS, FULL_SETTINGS, QUICK_SETTINGS
from benchmarks.report_tasks import report_tasks
from tests.reports import measured
from trt_kv.calibration.evaluation_findings import COMPARISONS
from trt_kv.calibration.evaluation_results import Results
from trt_kv.errors import ReportError, UsageError
from trt_kv.export.checkpoint import Checkpoint
from trt_kv.policies import policy_from_name, policy_names

pytestmark = pytest.mark.early

PNG_HEAD = b"\x89PNG"


def test_every_cell_has_every_policy_at_its_budget(quick: Results) -> None:
    names = {contender.name for contender in contenders()}
    for cell in quick.cells:
        assert {row.policy for row in cell.rows} == names
        for row in cell.rows:
            assert len(row.right) == 4
            if row.budget is not None:
                assert row.mean_kept == pytest.approx(row.budget, abs=0.01), row.name
        assert cell.full.kept == (1.0,) * 4
        assert cell.agreement(cell.full).value == 1.0


def test_the_full_cache_does_every_task(quick: Results) -> None:
    assert [cell.full.right for cell in quick.compared(asking=True)] == ["1111"] * 7
    assert all(quick.can(cell) for cell in quick.cells)


def test_what_is_certain_about_scores_shows(quick: Results) -> None:
    """Directions that hold with few short documents, pooled over all late questions."""
    late = quick.late()
    assert late is not None
    assert len(late.documents) == 20
    for budget in (0.2, 0.5):
        window, mass = late.row("window", budget), late.row("prefixkv", budget)
        assert window.accuracy.value > mass.accuracy.value + 0.3
        assert late.perplexity(window).value < late.perplexity(mass).value
        assert late.agreement(window).value > late.agreement(mass).value
        assert late.row("pooledwindow", budget).accuracy.value > late.row("snapkv", budget).accuracy.value - 0.05
    assert late.row("pooledwindow", 0.2).accuracy.value > 0.8 > 0.3 > late.row("random", 0.2).accuracy.value
    mass = late.row("prefixkv", 0.5)
    assert mass.question_kept is not None
    assert mass.question_kept < 0.5
    assert mass.kept_place < late.row("window", 0.5).kept_place


def test_what_is_certain_about_refreekv_shows(quick: Results) -> None:
    """The budget follows the input and falls with T; ranked by attention the stopping rule fails."""
    names = ("refreekv-0.001", "refreekv-0.003", "refreekv", "refreekv-0.03", "refreekv-0.1")
    for cell in quick.cells:
        rows = [cell.row(name) for name in names]
        for tighter, looser in itertools.pairwise(rows):
            assert all(np.array(tighter.kept) >= looser.kept)
        assert rows[0].mean_kept > rows[-1].mean_kept + 0.1
        assert all(row.kept_by_layer[:2] == (1.0, 1.0) for row in rows)
        assert cell.row("refreekv-no-exempt").mean_kept < rows[2].mean_kept - 0.1
        assert cell.row("refreekv-attention").mean_kept < rows[2].mean_kept - 0.1
        assert len(set(rows[2].kept)) > 1
    late = quick.late()
    assert late is not None
    assert late.row("refreekv-attention").accuracy.value < late.row("refreekv").accuracy.value
    assert late.row("refreekv-0.001").accuracy.value > late.row("refreekv-0.1").accuracy.value
    near, after = (quick.cell(task).row("refreekv") for task in ("needle_near", "follow_up"))
    assert max(near.kept) < min(after.kept)


def test_recipes_meet_their_budget_with_unequal_layers(quick: Results) -> None:
    assert {recipe.budget for recipe in quick.recipes} == set(QUICK_SETTINGS.budgets)
    for recipe in quick.recipes:
        assert np.mean(recipe.kept) == pytest.approx(recipe.budget, abs=0.002)
        assert recipe.spread > 1.2


def test_memory_is_that_of_the_kept_tokens(quick: Results) -> None:
    for row in quick.cells[0].rows:
        n_tokens = np.mean([document.n_prompt_tokens for document in quick.cells[0].documents])
        used = row.kv_bytes / quick.page_bytes * quick.page_size
        kept = row.mean_kept * n_tokens * 8
        assert kept - 1 <= used <= kept + 8 * quick.page_size


def test_every_preset_takes_part_and_comparisons_are_between_contenders() -> None:
    known = contenders()
    names = [contender.name for contender in known]
    assert len(set(names)) == len(names) == len({contender.label for contender in known})
    dropping = {name for name in policy_names() if not policy_from_name(name).recalls}
    assert {"full", *PUBLISHED} | {c.name for c in known if c.group == "ours"} == dropping
    for comparison in COMPARISONS:
        assert {comparison.policy, comparison.other} <= set(names)


def test_a_task_draws_documents_of_its_own_for_each_seed() -> None:
    drawn = [document.prompt for task in report_tasks(QUICK_SETTINGS) for document in task.documents(QUICK_SETTINGS, 384)]
    assert len(drawn) == len(set(drawn)) == 8 * 4
    late = [task for task in report_tasks(QUICK_SETTINGS) if task.facts.late]
    asked = [document.answer for task in late for document in task.documents(QUICK_SETTINGS, 384)]
    assert len(set(asked)) == len(asked)


def test_a_run_goes_on_where_it_stopped(
    quick: Results, full_folder: Path, bundled_checkpoint: Checkpoint, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is stored is measured again; a lost cell alone is."""
    lost = parts / "copy-384.json"
    content = lost.read_bytes()
    lost.unlink()
    runs: list[int] = []
    run = Harness.run

    def counted(*arguments: object) -> object:
        runs.append(1)
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Harness, "run", counted)
    monkeypatch.setattr(Harness, "full", None)
    monkeypatch.setattr(Harness, "importance", None)
    again = measured(bundled_checkpoint, full_folder, parts, QUICK_SETTINGS, [])
    assert len(runs) == 4 + 2, "the cell's documents, and two to tell how long it takes"
    found, expected = json.loads(lost.read_bytes())["part"], json.loads(content)["part"]
    assert {**found, "elapsed_s": 0} == {**expected, "elapsed_s": 0}
    assert [cell.rows for cell in again.cells] == [cell.rows for cell in quick.cells]
    runs.clear()
    told: list[str] = []
    measured(bundled_checkpoint, full_folder, parts, QUICK_SETTINGS, told)
    assert (runs, told) == ([], [])


def test_what_the_model_cannot_do_is_shown_and_not_compared(
    quick: Results,
    full_folder: Path,
    bundled_checkpoint: Checkpoint,
    parts: Path,
    quick_recall: RecallResults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Harness, "full", None)
    strict = dataclasses.replace(QUICK_SETTINGS, capable_from=1.01)
    told: list[str] = []
    results = measured(bundled_checkpoint, full_folder, parts, strict, told)
    assert told == [], "nothing is left to be measured"
    assert [cell.is_compared for cell in results.cells] == [False] * 7 + [True]
    assert [cell.task for cell in results.compared()] == ["plain_text"]
    assert results.late() is None
    text = report_text.report_markdown(results, quick_recall)
    assert "Left out of every comparison: one fact, near at 384, " in text
    assert "*100 (51–100)*" in text


def test_results_survive_the_file_and_make_the_same_report(quick: Results, quick_recall: RecallResults, tmp_path: Path) -> None:
    quick.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded == quick
    assert report_text.report_markdown(loaded, quick_recall) == report_text.report_markdown(quick, quick_recall)


def test_a_number_that_does_not_follow_from_the_documents_is_refused(quick: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    quick.save(path)
    data = json.loads(path.read_text())
    data["cells"][0]["rows"][1]["summary"]["accuracy"]["value"] = 0.99
    path.write_text(json.dumps(data))
    with pytest.raises(ReportError, match=r"needle_near at 384 tokens, prefixkv at 0.2 does not follow"):
        Results.load(path)


@pytest.mark.parametrize("content", ["[]", '{"format": "trt-kv-recipe", "version": 1}', "{"])
def test_a_file_that_holds_no_results_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(report.main, ["--from-results", str(tmp_path / "results.json"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "results" in result.output
    assert not (tmp_path / "out").exists()


def test_the_command_renders_a_report_from_its_results_alone(
    quick: Results, quick_recall: RecallResults, tmp_path: Path
) -> None:
    quick.save(tmp_path / "results.json")
    quick_recall.save(tmp_path / "recall.json")
    out = tmp_path / "out"
    result = CliRunner().invoke(report.main, ["--from-results", str(tmp_path / "results.json"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    pictures = {*report_plots.PICTURES, *report_recall_plots.RECALL_PICTURES}
    pages = {"report.md", "recall.md", "summary.md"}
    assert {path.name for path in out.iterdir()} == pictures | pages | {"results.json", "recall.json"}
    assert all((out / name).read_bytes().startswith(PNG_HEAD) for name in pictures)
    text = {name: (out / name).read_text() for name in pages}
    assert all(f"({name})" in text["report.md"] for name in report_plots.PICTURES)
    assert all(f"({name})" in text["recall.md"] for name in report_recall_plots.RECALL_PICTURES)
    assert text["summary.md"].strip() in text["report.md"]
    for name in ("results.json", "recall.json"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="main context"):
        dataclasses.replace(QUICK_SETTINGS, main_context=512)
    with pytest.raises(UsageError, match="one document"):
        dataclasses.replace(
            QUICK_SETTINGS, seeds=(0,), contexts=(dataclasses.replace(QUICK_SETTINGS.main, documents_per_seed=1),)
        )


def test_the_readme_takes_the_summary_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter"
    assert report.readme_with_summary(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter"
    for broken in ("none", f"{report.END}\n{report.BEGIN}", f"{text}\n{report.BEGIN}"):
        with pytest.raises(ReportError, match="no place"):
            report.readme_with_summary(broken, "new")


def test_the_committed_report_is_what_its_results_give() -> None:
    results = Results.load(report.COMMITTED / "results.json")
    recall = RecallResults.load(report.COMMITTED / "recall.json")
    assert results.settings == FULL_SETTINGS
    assert recall.plans == FULL_HOST_PLANS
    assert (report.COMMITTED / "report.md").read_text() == report_text.report_markdown(results, recall)
    assert (report.COMMITTED / "recall.md").read_text() == report_recall_text.recall_markdown(recall, results)
    summary = report_text.summary_markdown(results, recall)
    assert (report.COMMITTED / "summary.md").read_text() == summary + "\n"
    assert report.README.read_text() == report.readme_with_summary(report.README.read_text(), summary)
    pictures = {*report_plots.PICTURES, *report_recall_plots.RECALL_PICTURES}
    assert {path.name for path in report.COMMITTED.glob("*.png")} == pictures

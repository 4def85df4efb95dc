"""What the report promises: robust directions, every number from the results file, no cell measured twice."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.quality import __main__ as report
from benchmarks.quality.cell import Row
from benchmarks.quality.comparisons import best_published, percent
from benchmarks.quality.harness import Harness
from benchmarks.quality.pages import report_markdown
from benchmarks.quality.plans import QUICK_HOST_PLANS, QUICK_SETTINGS
from benchmarks.quality.plots.pictures import PICTURES
from benchmarks.quality.policies import contenders
from benchmarks.quality.recall.harness import RecallHarness
from benchmarks.quality.recall.measure import entries
from benchmarks.quality.recall.plots import RECALL_PICTURES
from benchmarks.quality.recall.policies import host_contenders
from benchmarks.quality.recall.results import RecallResults, beside
from benchmarks.quality.recall.tables import UNCORRECTED, measured_cells, sweep
from benchmarks.quality.results import Results
from benchmarks.quality.verdicts import rival_table, weak_table
from tests.quality import measured, measured_recall
from trt_kv.errors import ReportError
from trt_kv.export.checkpoints.base import Checkpoint

pytestmark = [pytest.mark.early, pytest.mark.slow]

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
        window, mass = late.row("window", budget), late.row("prefixkv_paper", budget)
        assert window.accuracy.value > mass.accuracy.value + 0.3
        assert late.perplexity(window).value < late.perplexity(mass).value
        assert late.agreement(window).value > late.agreement(mass).value
        assert late.row("prefixkv", budget).accuracy.value > late.row("snapkv", budget).accuracy.value - 0.05
    assert late.row("prefixkv", 0.2).accuracy.value > 0.8 > 0.3 > late.row("random", 0.2).accuracy.value
    mass = late.row("prefixkv_paper", 0.5)
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


def test_what_is_certain_about_recall_shows(quick: Results, quick_recall: RecallResults) -> None:
    """Directions that hold with few short documents."""
    late, copy, text = measured_cells(quick_recall, quick)
    assert [cell.name for cell in (late, copy, text)] == ["late questions", "long copy", "plain text"]
    right = {policy: late.all.row(policy, 0.2).accuracy.value for policy in ("freekv", "quest", "arkvale", "streamingllm")}
    assert min(right["freekv"], right["quest"], right["arkvale"]) > right["streamingllm"] + 0.5
    assert late.all.row("freekv", 0.2).accuracy.value >= late.all.row(UNCORRECTED, 0.2).accuracy.value
    assert late.all.row("freekv-windowrecipe", 0.2).accuracy.value > late.all.row("freekv-recipe", 0.2).accuracy.value + 0.5
    for cell in (late, copy, text):
        assert (
            cell.all.perplexity(cell.all.row("freekv", 0.2)).value < cell.all.perplexity(cell.all.row(UNCORRECTED, 0.2)).value
        )
        for row in cell.host.rows[1:]:
            if row.budget is not None and not row.policy.endswith("exempt"):
                assert row.budget - 0.04 < row.mean_kept < row.budget + 0.005, row.name
        moved = [cell.host.moved_by(policy.name, 0.2) for _, policy in sweep(quick_recall)]
        for less, more in itertools.pairwise(moved):
            assert np.mean(less.corrected_heads) <= np.mean(more.corrected_heads)
            assert np.mean(less.corrected_layer_steps) <= np.mean(more.corrected_layer_steps)
            assert np.mean(less.late) <= np.mean(more.late) + 0.5
        assert np.mean(moved[3].corrected_layer_steps) > np.mean(moved[3].corrected_heads) > 0.3


def test_every_cell_has_the_policies_of_its_plan(quick_recall: RecallResults) -> None:
    (plan,) = QUICK_HOST_PLANS
    expected = [(entry.contender.name, entry.budget) for entry in entries(plan, host_contenders())]
    assert [cell.task for cell in quick_recall.cells] == list(plan.tasks)
    for cell in quick_recall.cells:
        assert [(row.policy, row.budget) for row in cell.rows] == expected
        assert len(cell.moved) == len(cell.rows) - 1


def test_nothing_that_is_stored_is_measured_again(
    quick_recall: RecallResults,
    full_folder: Path,
    bundled_checkpoint: Checkpoint,
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(RecallHarness, "run", None)
    assert measured_recall(bundled_checkpoint, full_folder, parts, []) == quick_recall
    quick_recall.save(tmp_path / "recall.json")
    assert RecallResults.load(tmp_path / "recall.json") == quick_recall


def test_results_on_other_documents_are_not_put_side_by_side(quick: Results, quick_recall: RecallResults) -> None:
    cell = quick_recall.cells[0]
    others = tuple(dataclasses.replace(document, seed=7) for document in cell.documents)
    with pytest.raises(ReportError, match="other documents"):
        beside(quick, dataclasses.replace(cell, documents=others))


def test_ours_are_compared_with_the_best_published_policy_of_their_share(quick: Results) -> None:
    """A policy that finds its own budget: with the next smaller and the next larger share; and every loss is listed."""
    rivals = [policy.name for policy in quick.in_groups("published") if not policy.adaptive]
    for cell in quick.cells:
        for budget in QUICK_SETTINGS.budgets:
            best = best_published(quick)(cell, cell.row("prefixkv", budget))
            assert best is not None
            assert best.budget == budget
            assert best.right.count("1") == max(cell.row(name, budget).right.count("1") for name in rivals)
            assert best_published(quick, keeps_more=True)(cell, cell.row("prefixkv", budget)) is None
        reach = cell.row("reach")
        smaller, larger = (best_published(quick, keeps_more=more)(cell, reach) for more in (False, True))
        assert smaller is None or smaller.budget == max(b for b in QUICK_SETTINGS.budgets if b <= reach.mean_kept)
        assert larger is None or larger.budget == min(b for b in QUICK_SETTINGS.budgets if b >= reach.mean_kept)
        assert smaller is not larger


def test_where_ours_lose_is_told(quick: Results) -> None:
    def worse(row: Row) -> Row:
        return dataclasses.replace(row, losses=tuple(loss + 9 for loss in row.losses)) if row.policy == "reach" else row

    cells = [dataclasses.replace(cell, rows=tuple(map(worse, cell.rows))) for cell in quick.cells]
    results = dataclasses.replace(quick, cells=tuple(cells))
    kept = percent(results.cell("plain_text").row("reach").mean_kept)
    for rival in ("full cache", "best published", "refreekv"):
        assert f"| reach | {rival} | Plain text | {kept} |" in weak_table(results).splitlines()
        (line,) = [line for line in rival_table(results).splitlines() if line.startswith(f"| reach | {rival} |")]
        assert line.endswith("| `-` |")


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
    text = report_markdown(results, quick_recall)
    assert "*100 (51–100)*" in text


def test_results_survive_the_file_and_make_the_same_report(quick: Results, quick_recall: RecallResults, tmp_path: Path) -> None:
    quick.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded == quick
    assert report_markdown(loaded, quick_recall) == report_markdown(quick, quick_recall)


def test_a_number_that_does_not_follow_from_the_documents_is_refused(quick: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    quick.save(path)
    data = json.loads(path.read_text())
    data["cells"][0]["rows"][1]["summary"]["accuracy"]["value"] = 0.99
    path.write_text(json.dumps(data))
    with pytest.raises(ReportError, match=r"needle_near at 384 tokens, prefixkv_paper at 0.2 does not follow"):
        Results.load(path)


def test_the_command_renders_a_report_from_its_results_alone(
    quick: Results, quick_recall: RecallResults, tmp_path: Path
) -> None:
    quick.save(tmp_path / "results.json")
    quick_recall.save(tmp_path / "recall.json")
    out = tmp_path / "out"
    result = CliRunner().invoke(report.main, ["--from-results", str(tmp_path / "results.json"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    pictures = {*PICTURES, *RECALL_PICTURES}
    pages = {"report.md", "recall.md", "summary.md"}
    assert {path.name for path in out.iterdir()} == pictures | pages | {"results.json", "recall.json"}
    assert all((out / name).read_bytes().startswith(PNG_HEAD) for name in pictures)
    text = {name: (out / name).read_text() for name in pages}
    assert all(f"({name})" in text["report.md"] for name in PICTURES)
    assert all(f"({name})" in text["recall.md"] for name in RECALL_PICTURES)
    assert text["summary.md"].strip() in text["report.md"]
    for name in ("results.json", "recall.json"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()

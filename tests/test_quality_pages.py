"""What the report promises where nothing is measured: all policies, documents of their own, a current committed copy."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.quality import __main__ as report
from benchmarks.quality.comparisons import COMPARISONS
from benchmarks.quality.pages import recall_markdown, report_markdown, summary_markdown
from benchmarks.quality.plans import FULL_HOST_PLANS, FULL_SETTINGS, QUICK_SETTINGS
from benchmarks.quality.plots.pictures import PICTURES
from benchmarks.quality.policies import PUBLISHED, contenders
from benchmarks.quality.recall.plots import RECALL_PICTURES
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.results import Results
from benchmarks.quality.tasks import report_tasks
from trt_kv.errors import ReportError, UsageError
from trt_kv.policies import policy_from_name, policy_names


def test_every_preset_takes_part_and_comparisons_are_between_contenders() -> None:
    known = contenders()
    names = [contender.name for contender in known]
    assert len(set(names)) == len(names) == len({contender.label for contender in known})
    presets = {name: policy_from_name(name) for name in policy_names()}
    dropping = {name for name, policy in presets.items() if not policy.recalls and policy.heads != "own"}
    assert {"full", *PUBLISHED} | {c.name for c in known if c.group == "ours"} == dropping
    for comparison in COMPARISONS:
        assert {comparison.policy, comparison.other} <= set(names)


def test_a_task_draws_documents_of_its_own_for_each_seed() -> None:
    drawn = [document.prompt for task in report_tasks(QUICK_SETTINGS) for document in task.documents(QUICK_SETTINGS, 384)]
    assert len(drawn) == len(set(drawn)) == 8 * 4
    late = [task for task in report_tasks(QUICK_SETTINGS) if task.facts.late]
    asked = [document.answer for task in late for document in task.documents(QUICK_SETTINGS, 384)]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("content", ["[]", '{"format": "trt-kv-recipe", "version": 1}', "{"])
def test_a_file_that_holds_no_results_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(report.main, ["--from-results", str(tmp_path / "results.json"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "results" in result.output
    assert not (tmp_path / "out").exists()


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="main context"):
        dataclasses.replace(QUICK_SETTINGS, main_context=512)
    with pytest.raises(UsageError, match="one document"):
        dataclasses.replace(
            QUICK_SETTINGS, seeds=(0,), contexts=(dataclasses.replace(QUICK_SETTINGS.main, documents_per_seed=1),)
        )


def test_the_page_takes_the_summary_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter"
    assert report.page_with_summary(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter"
    for broken in ("none", f"{report.END}\n{report.BEGIN}", f"{text}\n{report.BEGIN}"):
        with pytest.raises(ReportError, match="no place"):
            report.page_with_summary(broken, "new")


def test_the_committed_report_is_what_its_results_give() -> None:
    results = Results.load(report.COMMITTED / "results.json")
    recall = RecallResults.load(report.COMMITTED / "recall.json")
    assert results.settings == FULL_SETTINGS
    assert recall.plans == FULL_HOST_PLANS
    assert (report.COMMITTED / "report.md").read_text() == report_markdown(results, recall)
    assert (report.COMMITTED / "recall.md").read_text() == recall_markdown(recall, results)
    summary = summary_markdown(results, recall)
    assert (report.COMMITTED / "summary.md").read_text() == summary + "\n"
    assert report.PAGE.read_text() == report.page_with_summary(report.PAGE.read_text(), summary)
    pictures = {*PICTURES, *RECALL_PICTURES}
    assert {path.name for path in report.COMMITTED.glob("*.png")} == pictures


def test_no_panel_has_more_than_five_series_and_every_axis_is_named() -> None:
    results = Results.load(report.COMMITTED / "results.json")
    recall = RecallResults.load(report.COMMITTED / "recall.json")
    figures = {name: draw(results) for name, draw in PICTURES.items()}
    figures |= {name: draw(recall, results) for name, draw in RECALL_PICTURES.items()}
    for name, figure in figures.items():
        for axis in figure.axes:
            labels = axis.get_legend_handles_labels()[1]
            assert len(set(labels)) <= 5, name
            if labels and name != "budgets.png":  # whose rows are named by task
                assert axis.get_xlabel(), name
                assert axis.get_ylabel(), name

"""The report's tasks, and the documents of each at a context."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.quality.results import TaskFacts
from benchmarks.quality.settings import Settings
from trt_kv.calibration.synthetic_english import LONGEST_FACT, LONGEST_QUESTION
from trt_kv.calibration.tasks import REGIONS, Region, Task, copy_tasks, distractor_tasks, evaluation_tasks, plain_text_tasks

Draw = Callable[[int, int, int], list[Task]]
"""(number of documents, context length, seed) -> documents."""


@dataclass(frozen=True, kw_only=True)
class ReportTask:
    """A task of the report and how its documents are generated. ``question_known``: the question is in the prompt."""

    facts: TaskFacts
    draw: Draw
    question_known: bool = True

    @property
    def name(self) -> str:
        return self.facts.name

    def n_fed(self, settings: Settings) -> int:
        """Approximate number of tokens decoded per document."""
        question = 0 if self.question_known else LONGEST_QUESTION
        longest = {"copy": settings.copy_length, "plain_text": settings.text_answer_length}
        return question + longest.get(self.name, LONGEST_FACT)

    def documents(self, settings: Settings, context_length: int) -> list[Task]:
        """The documents of every seed at a context."""
        count = settings.at(context_length).documents_per_seed
        return [task for seed in settings.seeds for task in self.draw(count, context_length, seed)]


def report_tasks(settings: Settings) -> list[ReportTask]:
    """The tasks, in the order in which they are shown."""
    places = {"near": "late", "middle": "in the middle", "far": "early"}
    needles = [_needle(region, place, REGIONS.index(region)) for region, place in places.items()]  # type: ignore[arg-type]
    return [
        *needles,
        ReportTask(
            facts=_facts("many", "Many facts", "one question at the end about one of many facts"),
            draw=lambda count, context, seed: evaluation_tasks(
                count, context_length=context, n_facts=settings.n_many(context), seed=_apart(seed, len(places))
            ),
        ),
        ReportTask(
            facts=_facts("distractors", "Distractors", "an early fact, then many that resemble it, then the question"),
            draw=lambda count, context, seed: distractor_tasks(
                count, context_length=context, n_distractors=settings.n_many(context), seed=seed
            ),
        ),
        ReportTask(
            facts=_facts(
                "copy",
                "Long copy",
                f"random words; {settings.cue_length} of them are said again, and the next {settings.copy_length} are due",
                late=False,
            ),
            draw=lambda count, context, seed: copy_tasks(
                count,
                context_length=context,
                cue_length=settings.cue_length,
                answer_length=settings.copy_length,
                seed=seed,
            ),
        ),
        ReportTask(
            facts=_facts(
                "follow_up",
                "Question after eviction",
                f"{settings.follow_up_facts} facts; the question comes only after tokens have been evicted",
                late=False,
            ),
            draw=lambda count, context, seed: evaluation_tasks(
                count, context_length=context, n_facts=settings.follow_up_facts, seed=_apart(seed, len(places) + 1)
            ),
            question_known=False,
        ),
        ReportTask(
            facts=_facts("plain_text", "Plain text", "more text after text without facts", late=False, asks=False),
            draw=lambda count, context, seed: plain_text_tasks(
                count, context_length=context, answer_length=settings.text_answer_length, seed=seed
            ),
        ),
    ]


def _needle(region: Region, place: str, number: int) -> ReportTask:
    return ReportTask(
        facts=_facts(f"needle_{region}", f"One fact, {region}", f"one fact, {place} in filler, and the question at the end"),
        draw=lambda count, context, seed: evaluation_tasks(
            count, context_length=context, n_facts=1, distance=region, seed=_apart(seed, number)
        ),
    )


def _apart(seed: int, number: int) -> int:
    """A different seed for each task that uses ``evaluation_tasks``, so that they do not ask for the same facts."""
    return 10 * seed + number


def _facts(name: str, title: str, description: str, *, late: bool = True, asks: bool = True) -> TaskFacts:
    return TaskFacts(name=name, title=title, description=description, late=late, asks=asks)

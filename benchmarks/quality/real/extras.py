"""Measures plain text and conversations; ``measure`` has the rest."""

from collections.abc import Sequence

from benchmarks.quality.real import conversations, texts
from benchmarks.quality.real.contenders import Entry, entries_of
from benchmarks.quality.real.known import talk_name, text_name
from benchmarks.quality.real.measure import Measurer
from benchmarks.quality.real.results import Loss, OneTalk, TalkRow, TextRow
from trt_kv.model_config import ModelConfig
from trt_kv.runtime.backends.base import DenseExecutor


def measured_texts(measurer: Measurer) -> tuple[TextRow, ...]:
    """As many texts as there is time for, under every policy that drops tokens."""
    settings = measurer.settings
    found: list[list[float]] = []
    dropping = [contender for contender in measurer.known if not contender.policy.recalls]
    entries = entries_of(dropping, settings.main.budgets, ())
    plans = [entry.contender.plan(measurer.recipes, entry.budget, lots=0) for entry in entries]
    for number in range(settings.n_texts):
        prompt, expected = texts.text(measurer.asker, settings.main.n_tokens, settings.text_tokens, number)

        def measured(missing: Sequence[int], prompt: Sequence[int] = prompt, expected: Sequence[int] = expected) -> list[Loss]:
            losses = measurer.answerer.losses(prompt, expected, [plans[i] for i in missing])
            return [Loss(nats=round(loss, 4)) for loss in losses]

        rows = measurer.rows(text_name(number), Loss, entries, plans, measured, ids=[*prompt, *expected])
        if rows is None:
            break
        found.append([row.nats for row in rows])
    return tuple(
        TextRow(policy=entry.contender.facts.name, budget=entry.budget, losses=tuple(of[i] for of in found))
        for i, entry in enumerate(entries if found else [])
    )


def measured_talks(measurer: Measurer, dense: DenseExecutor, config: ModelConfig) -> tuple[TalkRow, ...]:
    """As many conversations as there is time for: document after document, each under every policy and mode."""
    settings = measurer.settings
    entries = entries_of(measurer.known, settings.talk.budgets, settings.recall_budgets[:1])
    found: dict[tuple[int, str], list[OneTalk]] = {}
    for document in range(settings.talk.n_documents):
        asked = conversations.talk(measurer.asker, settings.talk, document)
        for mode in conversations.MODES:
            for at, entry in enumerate(entries):
                one = _one_talk(measurer, dense, config, entry, mode, document, asked)
                if one is not None:
                    found.setdefault((at, mode), []).append(one)
    return tuple(
        TalkRow(
            policy=entries[at].contender.facts.name,
            budget=entries[at].budget,
            mode=mode,
            right=tuple(one.right for one in talks),
            most_held=tuple(max(one.held) for one in talks),
            held_at_end=tuple(one.held[-1] for one in talks),
        )
        for (at, mode), talks in sorted(found.items())
    )


def _one_talk(
    measurer: Measurer,
    dense: DenseExecutor,
    config: ModelConfig,
    entry: Entry,
    mode: str,
    document: int,
    asked: conversations.Talk,
) -> OneTalk | None:
    """None: there is no time left for it."""
    talks: dict[tuple[str, float | None], OneTalk] = dict(measurer.earlier.rows(talk_name(document, mode)))
    if entry.key in talks:
        return talks[entry.key]
    plan = entry.contender.plan(measurer.recipes, entry.budget, lots=document)
    conditions = {"asked": repr(asked), "plan": repr(plan)}
    share = "own" if entry.budget is None else f"{entry.budget:g}"
    name = f"{talk_name(document, mode)}-{entry.contender.facts.name}-{share}"
    if measurer.out_of_time() and not measurer.store.has(name, **conditions):
        return None

    def measured() -> OneTalk:
        one = conversations.talked(dense, config, measurer.asker, plan, mode, asked)
        measurer.tell(f"{name}: {one.right}")
        return OneTalk(right=one.right, held=one.held)

    return measurer.store.get_or_measure(name, OneTalk, measured, **conditions)

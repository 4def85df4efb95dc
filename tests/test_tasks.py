"""What the synthetic tasks promise: the bundled model's language, the asked-for difficulty, and splits that never meet."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trt_kv.calibration.prompt_files import prompts_from_file
from trt_kv.calibration.synthetic_english import (
    LONGEST_FACT,
    LONGEST_FILLER,
    LONGEST_QUESTION,
    NAMES,
    SPLITS,
    VOCABULARY,
    Fact,
    draw_facts,
    draw_similar_facts,
    filler_sentence,
    place_sentence,
    split_of,
)
from trt_kv.calibration.tasks import (
    REGIONS,
    Region,
    Task,
    calibration_prompts,
    copy_tasks,
    distractor_tasks,
    evaluation_tasks,
    plain_text_tasks,
)
from trt_kv.errors import UsageError

TOKENIZER = Path(__file__).parents[1] / "trt_kv" / "models" / "llama3-tiny" / "tokenizer.json"


def _facts_told(task: Task) -> set[tuple[str, ...]]:
    """The facts in a document, read back from its words: sentences that tell a code, a thing or a home of somebody."""
    body = task.prompt.partition("question :")[0].split(" . ")
    told = [tuple(sentence.removesuffix(" .").split()) for sentence in body]
    return {(*words, ".") for words in told if {"code", "holds", "lives"} & set(words)}


def test_the_vocabulary_is_the_bundled_tokenizers() -> None:
    vocabulary = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    assert {word: index for index, word in enumerate(VOCABULARY)} == vocabulary


def test_the_bundled_tokenizer_reads_a_prompt_word_by_word_and_adds_bos_itself() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    for task in [*calibration_prompts(4), *plain_text_tasks(2, context_length=300)]:
        tokens = tokenizer.encode(task.prompt).tokens
        assert tokens == ["<bos>", *task.prompt.split(" ")]
        assert len(tokens) == task.n_prompt_tokens
        assert "<unk>" not in tokenizer.encode(task.answer).tokens


def test_the_sentence_forms_are_those_the_model_was_trained_on() -> None:
    rng = random.Random(1)
    lengths = {len(filler_sentence(rng)) for _ in range(200)}
    assert lengths == {8, 9, 11}
    assert max(lengths) == LONGEST_FILLER
    facts = [fact for split in SPLITS for fact in draw_facts(rng, 72, split)]
    assert max(len(fact.sentence) for fact in facts) == LONGEST_FACT
    assert max(len(fact.question) for fact in facts) == LONGEST_QUESTION
    by_question: dict[tuple[str, ...], set[int]] = {}
    for fact in facts:
        by_question.setdefault(fact.question[2:4], set()).add(len(fact.sentence))
    assert by_question == {("what", "is"): {8}, ("what", "does"): {6}, ("where", "does"): {7}}


def test_a_question_restates_its_fact_as_the_answer() -> None:
    for task in evaluation_tasks(20, context_length=256, n_facts=5):
        question = task.prompt[task.prompt.index("question :") :]
        assert task.prompt.endswith(" ? answer :")
        assert task.answer.endswith(" .")
        assert task.prompt.count("question :") == 1
        assert f" {task.answer} " in f" {task.prompt} "
        (name,) = set(task.answer.split()) & set(NAMES)
        assert name in question.split()


@given(st.integers(0, 10**6), st.sampled_from(["calibration", "evaluation"]), st.integers(1, 30))
@settings(max_examples=50)
def test_every_fact_of_a_document_belongs_to_its_split(seed: int, split: str, n_facts: int) -> None:
    if split == "calibration":
        (task,) = calibration_prompts(1, context_length=512, n_facts=[n_facts], seed=seed)
    else:
        (task,) = evaluation_tasks(1, context_length=512, n_facts=n_facts, seed=seed)
    told = _facts_told(task)
    assert len(told) == n_facts
    assert {split_of(words) for words in told} == {split}


def test_the_splits_share_no_document_and_no_fact() -> None:
    calibration = calibration_prompts(30, context_length=600, seed=3)
    evaluation = [task for n in (4, 16, 32) for task in evaluation_tasks(10, context_length=600, n_facts=n, seed=3)]
    assert not {task.prompt for task in calibration} & {task.prompt for task in evaluation}
    told = [set().union(*map(_facts_told, tasks)) for tasks in (calibration, evaluation)]
    assert not told[0] & told[1]
    assert min(map(len, told)) > 100


def test_the_same_seed_draws_the_same_tasks_and_another_seed_others() -> None:
    few = evaluation_tasks(3, context_length=300, n_facts=4, seed=5)
    many = evaluation_tasks(6, context_length=300, n_facts=4, seed=5)
    assert many[:3] == few
    assert len({task.prompt for task in many}) == 6
    assert evaluation_tasks(3, context_length=300, n_facts=4, seed=6) != few
    assert [task.index for task in many] == list(range(6))


def test_a_seed_draws_these_very_words_on_every_machine() -> None:
    (task,) = evaluation_tasks(1, context_length=60, n_facts=2, seed=0)
    assert f"{task.prompt} {task.answer}" == (
        "a road was often ancient and the wind drifted slowly . alice lives in the ancient tower . a ship was often old and "
        "the wind drifted slowly . code of ivan is 8 1 6 . question : what is the code of ivan ? answer : "
        "code of ivan is 8 1 6 ."
    )


@pytest.mark.parametrize("context_length", [64, 255, 1024])
def test_a_document_fills_its_context_to_within_a_sentence(context_length: int) -> None:
    tasks = calibration_prompts(8, context_length=context_length) + plain_text_tasks(
        2, context_length=context_length, answer_length=20
    )
    for task in tasks:
        assert context_length - LONGEST_FILLER <= task.n_prompt_tokens + task.n_answer_tokens <= context_length


def test_calibration_documents_tell_various_numbers_of_facts() -> None:
    assert [task.n_facts for task in calibration_prompts(5)] == [4, 8, 16, 32, 4]
    assert [task.n_facts for task in calibration_prompts(3, context_length=128)] == [4, 8, 4]
    assert [task.n_facts for task in calibration_prompts(3, n_facts=(3, 1))] == [3, 1, 3]


@pytest.mark.parametrize("distance", [0, 40, 200, 399])
def test_the_asked_fact_stands_as_far_from_the_end_as_asked(distance: int) -> None:
    for task in evaluation_tasks(10, context_length=450, n_facts=4, distance=distance):
        body = task.prompt[: task.prompt.index(" question :")]
        words_after = len(body[body.rindex(task.answer) + len(task.answer) :].split())
        assert words_after == task.fact_distance
        assert abs(words_after - distance) <= LONGEST_FILLER / 2


@pytest.mark.parametrize("region", REGIONS)
def test_near_middle_and_far_are_the_thirds_of_the_document(region: Region) -> None:
    third = REGIONS.index(region)
    for task in evaluation_tasks(20, context_length=700, n_facts=6, distance=region):
        assert task.fact_distance is not None
        assert (third / 3) * 640 - LONGEST_FILLER <= task.fact_distance <= (third + 1) / 3 * 700 + LONGEST_FILLER


def test_without_a_wish_the_asked_fact_stands_anywhere() -> None:
    tasks = evaluation_tasks(60, context_length=300, n_facts=6)
    distances = [task.fact_distance for task in tasks if task.fact_distance is not None]
    assert min(distances) < 60
    assert max(distances) > 200


def test_a_sentence_is_placed_as_close_to_its_distance_as_sentences_allow() -> None:
    others = [["a"] * 4, ["b"] * 3, ["c"] * 5]
    assert place_sentence(others, ["x"], 0) == ([*others, ["x"]], 0)
    assert place_sentence(others, ["x"], 6) == ([others[0], others[1], ["x"], others[2]], 5)
    assert place_sentence(others, ["x"], 12) == ([["x"], *others], 12)


@pytest.mark.parametrize("kind", ["code", "object", "home"])
def test_similar_facts_share_the_name_or_all_words_but_one(kind: str) -> None:
    values = {"code": ("4", "8", "2"), "object": ("red", "key"), "home": ("old", "harbor")}[kind]
    fact = Fact(name="alice", kind=kind, values=values)  # type: ignore[arg-type]
    similar = draw_similar_facts(random.Random(0), fact, 30)
    assert {other.kind for other in similar[:2]} == {"code", "object", "home"} - {kind}
    assert {other.name for other in similar[:2]} == {"alice"}
    assert len({other.name for other in similar[2:]} - {"alice"}) == 28
    for other in similar[2:]:
        assert other.kind == kind
        assert sum(a != b for a, b in zip(other.values, values, strict=True)) == 1
    assert {other.split for other in similar} == {fact.split}
    assert draw_similar_facts(random.Random(0), fact, 1)[0].name == "alice"
    assert draw_similar_facts(random.Random(0), fact, 0) == []


def test_distractors_stand_between_the_asked_fact_and_the_question() -> None:
    for task in distractor_tasks(12, context_length=450, n_distractors=10, seed=1):
        told = [tuple(sentence.split()) for sentence in task.prompt.partition("question :")[0].split(" . ")]
        asked = tuple(task.answer.removesuffix(" .").split())
        facts = [words for words in told if {"code", "holds", "lives"} & set(words)]
        assert facts.index(asked) == 0
        assert facts.count(asked) == 1
        assert len(facts) == task.n_facts == 11
        (name,) = set(asked) & set(NAMES)
        assert sum(name in words for words in facts) == 3
        assert told.index(asked) <= len(told) / 4 + 1
        body = task.prompt[: task.prompt.index(" question :")]
        assert task.fact_distance == len(body[body.index(task.answer) + len(task.answer) :].split())
        assert 450 - LONGEST_FILLER <= task.n_prompt_tokens + task.n_answer_tokens <= 450


def test_a_copy_goes_on_where_its_cue_stood_in_the_document() -> None:
    tasks = copy_tasks(40, context_length=300, cue_length=9, answer_length=21, seed=2)
    for task in tasks:
        words = task.prompt.split()
        document, cue = words[: -task.n_question_words], words[-task.n_question_words :]
        assert task.fact_distance is not None
        end = len(document) - task.fact_distance
        assert document[end - 30 : end] == [*cue, *task.answer.split()]
        assert len(cue) == 9
        assert task.n_prompt_tokens + task.n_answer_tokens == 300
        assert set(words) <= set(VOCABULARY) - {"<pad>", "<bos>", "<eos>", "<unk>"}
    distances = [task.fact_distance for task in tasks if task.fact_distance is not None]
    assert min(distances) < 60
    assert max(distances) > 180
    assert tasks[:3] == copy_tasks(3, context_length=300, cue_length=9, answer_length=21, seed=2)


def test_plain_text_tells_no_facts_and_its_answer_goes_on() -> None:
    for task in plain_text_tasks(5, context_length=256, answer_length=48, seed=2):
        assert not _facts_told(task)
        assert task.n_answer_tokens == 48
        assert (task.kind, task.n_facts, task.fact_distance) == ("text", 0, None)


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        evaluation_tasks(1, context_length=100, n_facts=20)
    with pytest.raises(UsageError, match="do not fit"):
        calibration_prompts(1, context_length=30)
    for n_facts in (0, 73):
        with pytest.raises(UsageError, match="1 to 72"):
            evaluation_tasks(1, context_length=5000, n_facts=n_facts)
    with pytest.raises(UsageError, match="so far from the end"):
        evaluation_tasks(1, context_length=200, n_facts=4, distance=200)
    with pytest.raises(UsageError, match="so far from the end"):
        evaluation_tasks(1, context_length=200, n_facts=4, distance=-1)
    with pytest.raises(UsageError, match="distance"):
        evaluation_tasks(1, context_length=200, n_facts=4, distance="further")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="count"):
        calibration_prompts(0)
    with pytest.raises(UsageError, match="n_facts is empty"):
        calibration_prompts(1, n_facts=[])
    with pytest.raises(UsageError, match="distractors do not fit"):
        distractor_tasks(1, context_length=100, n_distractors=20)
    with pytest.raises(UsageError, match="0 to 73"):
        distractor_tasks(1, context_length=5000, n_distractors=74)
    with pytest.raises(UsageError, match="too short to be copied"):
        copy_tasks(1, context_length=144)
    with pytest.raises(UsageError, match="too short to be copied"):
        copy_tasks(1, context_length=512, cue_length=0)
    with pytest.raises(UsageError, match="too short for its answer"):
        plain_text_tasks(1, context_length=64, answer_length=64)


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffthe first\r\n\r\n  the second, as it stands \n\t\nthe\rthird".encode())
    assert prompts_from_file(path) == ["the first", "  the second, as it stands ", "the\rthird"]


def test_json_lines_may_hold_line_breaks_and_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines\u2028here", "id": 1}\n{"id": 2, "prompt": "x"}\n', encoding="utf-8")
    assert prompts_from_file(path) == ["two\nlines\u2028here", "x"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"\xef\xbb\xbf\n\r\n  \n", "file with the prompts is empty"),
        ("p.txt", b"", "file with the prompts is empty"),
        ("p.txt", b"one\ntw\xffo\n", "byte 6 in line 2"),
        ("p.txt", b"\xef\xbb\xbfone\xff\n", "byte 6 in line 1"),
        ("p.txt", "one".encode("utf-16"), "is not UTF-8 text"),
        ("p.jsonl", b"", "file with the prompts is empty"),
        ("p.jsonl", b'{"prompt": "x"}\n\n{"prompt": ', "line 3 of .*is not JSON"),
        ("p.jsonl", b'{"prompt": "a \\ud83d"}\n', '"prompt" in line 1 of (?s:.*)a lone surrogate at byte 2'),
        ("p.jsonl", b'{"text": "x"}\n', "line 1 of .*holds no prompt"),
        ("p.jsonl", b'["x"]\n', "line 1 of .*holds no prompt"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1 of .*holds no prompt"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1 of .*holds an empty prompt"),
        ("p.csv", b"x", "txt or .jsonl"),
    ],
)
def test_a_wrong_prompt_file_is_refused_with_the_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        prompts_from_file(tmp_path / name)


def test_a_missing_prompt_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        prompts_from_file(tmp_path / "prompts.txt")

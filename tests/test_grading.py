"""When an answer is right: whole words and numbers, whatever the white space."""

import pytest

from trt_kv.calibration.task_files import is_right


@pytest.mark.parametrize(
    ("text", "accepted", "begins", "contains"),
    [
        ("  4 8\n2 . then", ["4 8 2 ."], True, True),
        ("it is 4 8 2 .", ["4 8 2 ."], False, True),
        ("4", ["4 8"], False, False),
        ("42", ["4"], False, False),
        ("4.2", ["4"], False, False),
        ("part of art", ["art"], False, True),
        ("Parisian", ["Paris"], False, False),
        ("Éclairs", ["Éclair"], False, False),
        ("巴黎是首都", ["巴黎"], True, True),
        ("ja", ["yes", "ja"], True, True),
        ("", ["x"], False, False),
    ],
)
def test_whole_words_are_compared_whatever_the_white_space(
    text: str, accepted: list[str], begins: bool, contains: bool
) -> None:
    assert is_right(text, accepted, "exact") is begins
    assert is_right(text, accepted, "contains") is contains


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *(
            (text, "4")
            for text in ("4.5", "4,5", "4,000", "4/5", "4%", "4:30", "4^2", "4²", "4½", "4-5", "4–5", "4th", "4*5", "4_5")
        ),
        *((text, "5") for text in ("-5", "\u22125", "it is -5", "(-5)", ".5", "-.5", "3-5", "3.5", "x-5", "$-5")),
        ("1,000 people", "1"),
        ("1.000", "1"),
        ("10^5", "10"),
        ("it is 3.14", "14"),
        ("12:30", "30"),
        *((text, "can") for text in ("can't", "can\u2019t", "can\u02bct", "can-do", "can\u2010do", "can_do")),
        ("cafe\u0301", "cafe"),
        ("x\u0323", "x"),
        ("\u0915\u093f", "\u0915"),
        ("forty-two", "forty"),
        ("un-known", "known"),
    ],
)
def test_a_part_of_a_word_or_number_is_not_right(text: str, wanted: str) -> None:
    assert not is_right(text, [wanted], "exact")
    assert not is_right(text, [wanted], "contains")
    assert is_right(text, [text], "exact")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *(
            (text, "4")
            for text in ("4", "4.", "4, because", "4: it", "4/", "4-", "4!", "4)", "4.Because", "4年", "4'", "4 %", "4 .5")
        ),
        ("-5", "-5"),
        ("\u22125 degrees", "-5"),
        ("4.5.", "4.5"),
        ("1,000", "1,000"),
        ("4%", "4%"),
        ("cafe\u0301", "caf\u00e9"),
        ("can\u2019t", "can't"),
        ("well\u2011known", "well-known"),
        ("Paris.The capital", "Paris"),
        ("Paris\u2014the capital", "Paris"),
        ("James' book", "James"),
    ],
)
def test_punctuation_after_a_word_or_number_is_no_part_of_it(text: str, wanted: str) -> None:
    assert is_right(text, [wanted], "exact")


@pytest.mark.parametrize("text", ["'Paris'", '"Paris"', "«Paris»", "(Paris)", "$4: Paris", "- Paris", "... Paris"])
def test_quotes_and_brackets_do_not_hide_what_they_enclose(text: str) -> None:
    """They are a beginning of their own, though."""
    assert is_right(text, ["Paris"], "contains")
    assert not is_right(text, ["Paris"], "exact")
    assert is_right("$4", ["4"], "contains")

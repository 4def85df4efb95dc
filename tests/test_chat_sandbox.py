"""Chat templates may come from anybody: they reach nothing but their data, and none runs for long or fills the memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError, TemplateError

from trt_kv.chat import bounds, sandbox
from trt_kv.chat.templates import MAX_TEMPLATE_BYTES, ChatTemplates
from trt_kv.errors import UsageError

TEMPLATES = ChatTemplates(owner="the engine")
DOUBLED = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = HOW %}{% endfor %}{{ ns.s | length }}"

TOO_LONG = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops with text": "{% for i in range(99999) %}{% for j in range(99999) %}" + "x" * 99 + "{% endfor %}{% endfor %}",
    "loops over text": "{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macros without end": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a recursive loop": "{% for x in range(3) recursive %}{{ loop([1]) }}{% endfor %}",
}
TOO_LARGE = {
    "+": DOUBLED.replace("HOW", "ns.s + ns.s"),
    "~": DOUBLED.replace("HOW", "ns.s ~ ns.s"),
    "join": DOUBLED.replace("HOW", "[ns.s, ns.s] | join"),
    "replace": DOUBLED.replace("HOW", "ns.s | replace('a', 'aa')").replace("range(60)", "range(99)"),
    "a block": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = x %}{% endfor %}",
    "lists in lists": DOUBLED.replace("HOW", "[ns.s, ns.s]").replace("ns.s | length", "ns.s"),
    "lists in lists as JSON": DOUBLED.replace("HOW", "[ns.s, ns.s]").replace("ns.s | length", "ns.s | tojson"),
    "numbers": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a product": "{{ 'a' * 10**10 }}",
    "a product of lists": "{{ [1] * 10**10 }}",
    "center": "{{ 'a'.center(10**10) }}",
    "center, a filter": "{{ 'a' | center(10**10) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(10**8) }}",
    "JSON": "{{ [[1]] | tojson(indent=10**10) }}",
    "a format": "{{ '%999999999d' % 1 }}",
    "a format, a filter": "{{ '%999999999d' | format(1) }}",
    "a format of str": "{{ '{:999999999}'.format(1) }}",
    "a format in a format": "{{ '{:{}}'.format(1, 999999999) }}",
    "a width that is given": "{{ '%*d' % (999999999, 1) }}",
    "replace, a method": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "tabs": "{{ ('\\t' * 10**6).expandtabs(10**6) }}",
    "a date": "{{ strftime_now('%999999999Y') }}",
    "many widths": "{{ ('{:99999} ' * 20000).format(1) }}",
    "a format that repeats": "{{ ('{0} ' * 10**5).format('x' * 10**6) }}",
    "texts that a filter makes": "{{ range(99999) | map('center', 2 * 10**6) | list }}",
    "many texts": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['x' * 10**6] %}{% endfor %}",
    "slices": "{% set b = 'x' * 10**7 %}" + "".join(f"{{% set a{i} = b[::-1] %}}" for i in range(300)),
    "a block of the template's text": "{% set y %}{% for i in range(999) %}" + "x" * 10**5 + "{% endfor %}{% endset %}",
    "a block of values": "{% set b = 'x' * 10**7 %}{% set y %}{% for i in range(999) %}{{ b }}{% endfor %}{% endset %}",
    "a macro's arguments": "{% set ns = namespace(l=[1]) %}{% macro f() %}{% set ns.l = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(ns.l, ns.l) }}{% endfor %}{{ ns.l == ns.l }}",
    "comparisons": "{% set ns = namespace(l=[1], m=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}"
    "{% set ns.m = [ns.m, ns.m] %}{% endfor %}{{ ns.l == ns.m }}",
    "keys": "{% set ns = namespace(t=(1,)) %}{% for i in range(60) %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    "characters": "{{ ('x' * 10**7) | sort | length }}",
    "batch": "{{ 'ab' | batch(10**9, 'x') | list }}",
    "slice": "{{ 'ab' | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "wordwrap": "{{ ('x ' * 10**6) | wordwrap(1) }}",
}
"""Of which some would also take years."""


def test_jinja2_is_imported_when_something_is_rendered() -> None:
    code = "import sys, trt_kv.chat.encoder, trt_kv.chat.turns, trt_kv.pipeline.chat; print('jinja2' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert answer.stdout == "False\n"


@pytest.mark.parametrize("template", TOO_LONG.values(), ids=TOO_LONG)
def test_a_template_that_takes_too_long_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_STEPS", 3000)
    begin = time.process_time()
    with pytest.raises(UsageError, match="cannot be rendered"):
        TEMPLATES.render("default", template, {"s": "x" * 999})
    assert time.process_time() - begin < 60  # of years


@pytest.mark.parametrize("template", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_value_that_is_too_large_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match="too large"):
        TEMPLATES.render("default", template, {})


def test_the_time_of_a_rendering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with pytest.raises(UsageError, match="takes too long: stopped after 704 steps"):
        TEMPLATES.render("default", "{% for i in range(9999) %}{% endfor %}", {})


@pytest.mark.parametrize(
    "template",
    ["{{ many | reject('in', many) | list }}", "{{ many | map('upper') | list }}", "{{ many | select('equalto', 1) | list }}"],
)
def test_the_time_of_filters_over_many_items_is_bounded(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with pytest.raises(UsageError, match="takes too long"):
        TEMPLATES.render("default", template, {"many": ["a"] * 999})


def test_memory_that_cannot_be_had_is_an_error_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(bounds, "checked_result", fails)
    with pytest.raises(UsageError, match="cannot be rendered\n  got: MemoryError"):
        TEMPLATES.render("default", "{{ 1 + x }}", {"x": 1})


def test_the_length_of_the_text_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_LENGTH", 500)
    assert len(TEMPLATES.render("default", "{% for i in range(50) %}0123456789{% endfor %}", {})) == 500
    with pytest.raises(UsageError, match="longer than 500 characters"):
        TEMPLATES.render("default", "{% for i in range(51) %}0123456789{% endfor %}", {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ x.__init__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_a=1) }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.json }}",
        "{{ self.__init__.__globals__.x }}",
        "{{ dict.fromkeys([1]).x.y }}",
        "{% include 'x' %}",
        "{% import 'x' as x %}",
        "{% extends 'x' %}",
        "{{ lipsum(n=9) }}",
        "{{ 'x'.encode() }}{{ (1).to_bytes(9, 'big') }}{{ 'x'.translate({120: 'y'}) }}",
    ],
)
def test_a_template_reaches_nothing_but_its_data(template: str) -> None:
    try:
        assert sandbox.render(template, {"messages": [], "x": 1}) == ""
    except (SecurityError, TemplateError, TypeError):
        return


def test_errors_name_the_template_and_its_line() -> None:
    with pytest.raises(UsageError) as caught:
        TEMPLATES.render(
            "tool_use", "a\n{% if tools %}\n{{ raise_exception('no\x1b[2Jtools\nhere') }}{% endif %}", {"tools": 1}
        )
    assert "'tool_use' of the engine refuses these messages" in str(caught.value)
    assert "no\\x1b[2Jtools here (line 3 of the template)" in str(caught.value)
    with pytest.raises(UsageError, match=r"malformed\n  got: line 2: Unexpected end of template"):
        TEMPLATES.render("default", "a\n{% if x %}", {})
    with pytest.raises(UsageError, match=r"UndefinedError|'m' is undefined.*line 2"):
        TEMPLATES.render("default", "a\n{{ m.role }}", {})
    with pytest.raises(UsageError, match=r"TypeError: .*line 1"):
        TEMPLATES.render("default", "{{ 1 + 'a' }}", {})
    with pytest.raises(UsageError, match="writes no text"):  # which no tokenizer takes
        TEMPLATES.render("default", "{{ '\\ud800' }}", {})
    with pytest.raises(UsageError, match="SyntaxError"):
        TEMPLATES.render("default", "{{ x[1:2, 3] }}", {})
    with pytest.raises(UsageError, match="cannot be rendered") as caught:
        TEMPLATES.render("default", "{{ " + "(" * 5000 + ")" * 5000 + " }}", {})
    assert MAX_TEMPLATE_BYTES > 10_000


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for x in 'abc' %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "ac"),
        ("{% for x in 'abc' %}{% if loop.last %}{% break %}{% endif %}{{ x }}{% endfor %}", "ab"),
        ("{% generation %}hi{% endgeneration %}", "hi"),
        ("{{ {'a': '<é&'} | tojson }}{{ {'a': 'é'} | tojson(ensure_ascii=true) }}", '{"a": "<é&"}{"a": "\\u00e9"}'),
        ("{{ 1 ~ 'a' ~ none ~ 2.5 }}", "1aNone2.5"),
        ("{{ '%s and %05d' % ('a', 3) }}{{ '{}-{:>3}'.format('a', 3) }}{{ '%s' | format(3) }}", "a and 00003a-  33"),
        ("{{ strftime_now('%Y') | length }}{{ dict(a=1).a }}{{ [3, 1] | sort | first }}", "411"),
        ("{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(1) %}y{% endcall %}", "<1y>"),
        ("{% set ns = namespace(self=1, a=2) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.self }}", "31"),
        ("{{ [1, [2, {'a': 'b'}]] }}{{ x is defined }}{{ x | default('d') }}", "[1, [2, {'a': 'b'}]]Falsed"),
        (
            "{{ 1000 | round(1) }} {{ 2.567 | round(2) }} {{ [1, 2] | sum }} {{ [[1, 2], [3]] | sum(start=0) if none }}",
            "1000 2.57 3 ",
        ),
        (
            "{{ 'abcd'[1:3] }}{{ [x, 2, 3][:2] | length }}{{ (1, x)[0] }}{% for a, b in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}",
            "bc2112",
        ),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ 'b a' | title }}", "[[1, 2], [3]]B A"),
        ("{{ 2 ** 10 }} {{ 7 % 4 }} {{ [1] + [2] }} {{ 'ab' * 2 }} {{ 'a\nb' | indent(2) }}", "1024 3 [1, 2] abab a\n  b"),
    ],
)
def test_what_templates_use_works(template: str, text: str) -> None:
    assert TEMPLATES.render("default", template, {}) == text

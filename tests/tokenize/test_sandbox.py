"""A template ends before it has cost much, whatever it loops over, doubles, pads or calls; what it may do it does."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from jinja2 import TemplateError

from gold.tokenize.sandbox import MOST_WORK, compiled_template

BIG = "10000000000"

REPEAT = "{{% for i in range(99) %}}{{% set n.x = {} %}}{{% endfor %}}"

ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop for nothing": "{% for a in range(9999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a long range": f"{{% for a in range({BIG}) %}}x{{% endfor %}}",
    "a product": f"{{{{ 'x' * {BIG} }}}}",
    "a product the other way": f"{{{{ {BIG} * 'x' }}}}",
    "a list": f"{{{{ [0] * {BIG} }}}}",
    "a power": f"{{{{ 10 ** {BIG} }}}}",
    "factors": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "blocks": (
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}"
    ),
    "lists of lists": "{% set n = namespace(x=1) %}" + REPEAT.format("[n.x, n.x]") + "{{ n.x }}",
    "pairs of pairs": "{% set n = namespace(x=1) %}" + REPEAT.format("(n.x, n.x)") + "{{ n.x }}",
    "objects": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}"
        "{{ n.x | tojson }}"
    ),
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "padding": f"{{{{ 'x'.ljust({BIG}) }}}}",
    "zeros": f"{{{{ 'x'.zfill({BIG}) }}}}",
    "tabs": f"{{{{ '\\t'.expandtabs({BIG}) }}}}",
    "bytes": f"{{{{ (1).to_bytes({BIG}, 'big') }}}}",
    "centred": f"{{{{ 'x' | center({BIG}) }}}}",
    "indented": f"{{{{ 'x' | indent({BIG}, true) }}}}",
    "json": f"{{{{ [1] | tojson(indent={BIG}) }}}}",
    "batches": f"{{{{ [1] | batch({BIG}, 0) | list }}}}",
    "slices": f"{{{{ [1] | slice({BIG}) | list }}}}",
    "rounded": f"{{{{ 1.5 | round({BIG}) }}}}",
    "a format": f"{{{{ '%{BIG}d' % 1 }}}}",
    "a format's width": f"{{{{ '%*d' % ({BIG}, 1) }}}}",
    "the filter": f"{{{{ '%{BIG}d' | format(1) }}}}",
    "the method": f"{{{{ '{{:{BIG}}}'.format(1) }}}}",
    "the method's width": f"{{{{ '{{:{{}}}}'.format(1, {BIG}) }}}}",
    "a date": f"{{{{ strftime_now('%{BIG}d') }}}}",
    "replaced": "{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}",
    "replaced by the filter": "{% set x = 'x' * 99999 %}{{ x | replace('x', x) }}",
    "joined": "{% set x = 'x' * 99999 %}{{ x.join(range(99999)) }}",
    "joined by the filter": "{% set x = 'x' * 99999 %}{{ range(99999) | list | join(x) }}",
    "translated": "{% set x = 'x' * 99999 %}{{ x.translate({120: x}) }}",
    "paragraphs": "{{ lipsum(n=99999) }}",
    "written": "{% set x = 'x' * 9999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% for a in b %}" * 300 + "{% endfor %}" * 300,
    "long": "x" * (2**20 + 1),
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_without_measure_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gold.tokenize.sandbox.MOST_WORK", MOST_WORK // 32)  # a second for each else
    with pytest.raises((TemplateError, RecursionError, TypeError, OverflowError)):
        raise AssertionError(compiled_template(template).render(messages=[])[:99])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{a.__class__}'.format_map({'a': messages}) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__name__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
    ],
)
def test_what_belongs_to_python_is_not_there(template: str) -> None:
    messages = ["x"]
    try:
        said = compiled_template(template).render(messages=messages)
    except TemplateError:
        said = ""
    assert (said, messages) == ("", ["x"])


def test_what_it_may_do_it_does() -> None:
    template = (
        "{% for a in range(300) %}{% for b in range(300) if b % 3 == 0 %}{% endfor %}{% endfor %}"
        "{{ 'ab' * 3 }}{{ 1 ~ 'x' ~ [1, a] }}{{ (1, 'y') }}{{ '%-5s|' % 'z' }}{{ '%s %s' % (1, 2) }}"
        "{{ '{:>4}'.format(7) }}{{ 2 ** 10 }}{{ ['a', 'b'] | join('-') }}{{ 'aXb'.split('X') | last }}"
        "{{ [1, 2] | tojson(indent=1) }}{{ 'x' | center(3) }}{{ messages[0].content | replace('a', 'bb') }}"
        "{{ 'a' in ('a', 'b') }}{% if messages is not none and [messages] %}!{% endif %}"
    )
    said = compiled_template(template).render(messages=[{"content": "aa"}], a=None)
    assert said == "ababab1x[1, None](1, 'y')z    |1 2   71024a-bb[\n 1,\n 2\n] x bbbbTrue!"


def test_a_date_that_the_caller_makes_is_no_wider() -> None:
    template = compiled_template("{{ strftime_now('%999999d') }}")
    with pytest.raises(TemplateError, match="places"):
        template.render(strftime_now=lambda form: form)


def test_each_rendering_begins_anew_in_every_thread() -> None:
    template = compiled_template("{% for m in messages %}{{ m }}{% endfor %}")
    message = "x" * (MOST_WORK // 8)
    said: list[int] = []

    def render() -> None:
        said.extend(len(template.render(messages=[message] * 4)) for _ in range(2))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [4 * len(message)] * 4


def test_a_rendering_that_keeps_the_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10_000, 5))
    monkeypatch.setattr("gold.tokenize.sandbox.time.thread_time", lambda: next(seconds))
    with pytest.raises(TemplateError, match="seconds"):
        compiled_template("{% for a in range(9999) %}{% endfor %}").render()


@pytest.mark.parametrize("value", [{"a": 1}, [1], "x", 1.5, None])
def test_values_are_shown_as_python_shows_them(value: Any) -> None:
    assert compiled_template("{{ value }}").render(value=value) == str(value)

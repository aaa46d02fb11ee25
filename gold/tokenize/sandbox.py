"""Runs chat templates, which are untrusted programs: compiled as in transformers, in a sandbox with a work limit.

A rendering has a work budget: a loop iteration costs 64, a call or filter 512, a created value its characters or
items (a list that contains another twice counts it twice). Excessive work is rejected before it is done, and so is a
rendering that has used twenty seconds of CPU time.

This module imports jinja2; the others import it when they render.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_WORK = 2**27
MOST_SECONDS = 20.0
LONGEST_TEMPLATE = 2**20

_PASS, _CALL = 64, 512
_CHECKED_EVERY = 2**14
_WIDEST = 10_000
"""Maximum for columns, decimals and similar numbers in a template."""

_WIDE = re.compile(
    r"%(?:\([^)]*\))?[-+ #0-9.^_]*(?:\*|\d{5})"  # of Python's % and of strftime
    r"|\{[^{}]*:[^{}]*(?:\{|\d{5})"
)
_TAKE_WIDTHS = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"}
_TAKE_WIDTHS |= {"indent", "batch", "slice", "tojson", "round"}
_MULTIPLY = {"join", "indent", "wordwrap", "tojson", "xmlattr"}


class _Work(threading.local):
    """The remaining budget of this thread's rendering."""

    left, until, checked = MOST_WORK, float("inf"), 0

    def begin(self) -> None:
        self.left, self.checked = MOST_WORK, MOST_WORK
        self.until = time.thread_time() + MOST_SECONDS

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError("it does more work, or writes more, than any template for conversations")
        if self.checked - self.left > _CHECKED_EVERY:
            self.checked = self.left
            if time.thread_time() > self.until:
                raise SecurityError(f"it takes more than {MOST_SECONDS:g} seconds")


_work = _Work()


class CompiledTemplate:
    """A template that can be rendered in any thread."""

    def __init__(self, template: Any) -> None:
        self._template = template

    def render(self, **values: Any) -> str:
        """The rendered text.

        Raises: jinja2.TemplateError if the template rejects the values or exceeds the work limit, and any exception
        that the template raises.
        """
        _work.begin()
        text: str = self._template.render(**values)
        return text


@lru_cache(maxsize=64)
def compiled_template(template: str) -> CompiledTemplate:
    """The compiled template.

    Raises: jinja2.TemplateError for a syntax error; so does its `render` for messages that it rejects.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise SecurityError(f"it has more than {LONGEST_TEMPLATE:,} characters")
    _work.begin()
    environment = _environment()
    try:
        tree = environment.parse(template)
        _WorkCounter().visit(tree)
        tree.set_environment(environment)
        code = environment.compile(tree)
    except (RecursionError, MemoryError, SyntaxError, ValueError):
        raise SecurityError("it is nested too deeply") from None
    return CompiledTemplate(
        environment.template_class.from_code(environment, code, environment.make_globals(None))
    )


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote; its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Counted(Extension):
    """The counting code that `_WorkCounter` inserts."""

    @property
    def step(self) -> bool:  # an attribute access is ten times as fast as a call in the sandbox
        _work.spend(_PASS)
        return True

    def concat(self, *parts: Any) -> str:
        return _joined(map(str, map(_sized, parts)))

    def all(self, *items: Any) -> list[Any]:
        return list(items)

    def each(self, *items: Any) -> tuple[Any, ...]:
        return items


class _WorkCounter(NodeTransformer):
    """Inserts counting into each loop iteration, each `~`, and each list and tuple that is not constant."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        step = nodes.ExtensionAttribute(_Counted.identifier, "step")
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(step, node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._call("concat", node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return node if self._is_constant(node.items) else self._call("all", node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx != "load" or self._is_constant(node.items) else self._call("each", node.items)

    @staticmethod
    def _call(name: str, arguments: Iterable[nodes.Expr]) -> nodes.Call:
        function = nodes.ExtensionAttribute(_Counted.identifier, name)
        return nodes.Call(function, list(arguments), [], None, None)

    @staticmethod
    def _is_constant(items: Iterable[nodes.Expr]) -> bool:
        return all(isinstance(item, nodes.Const) for item in items)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with counted work."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _work.spend(_CALL)
        inner = getattr(__obj, "__wrapped__", __obj)  # the sandbox has its own `format`
        owner = getattr(inner, "__self__", None)
        if isinstance(owner, str | bytes | int):
            named = [value for name, value in kwargs.items() if not name.startswith("_")]  # not the context
            _forecast(inner.__name__, owner, (*args, *named))
        elif args and __obj is __context.resolve_or_missing("strftime_now"):
            _forecast("format", args[0], ())
        return _sized(super().call(__context, __obj, *args, **kwargs), spend=True)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _work.spend(1)
        if operator == "%" and isinstance(left, str):
            _forecast("format", left, (right,))
        for one, other in ((left, right), (right, left)) if operator == "*" else ():
            if isinstance(other, int) and not isinstance(one, int | float):
                _work.spend(len(one) * max(other, 0))
        if isinstance(left, int) and isinstance(right, int):
            bits = right if operator == "**" else 1
            if left.bit_length() * bits > _WIDEST or right.bit_length() > _WIDEST:
                raise SecurityError("it calculates with numbers that are too large")
        return _sized(super().call_binop(context, operator, left, right), spend=True)


class _PlainNamespace(Namespace):
    """A namespace that rejects names with a meaning in Python."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no names that begin with _, such as {name}")
        super().__setitem__(name, value)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _as_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, _Counted, loopcontrols],
        finalize=_sized,
    )
    environment.filters["tojson"] = _as_json
    environment.filters = {name: _counted(name, does) for name, does in environment.filters.items()}
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _PlainNamespace,
        "dict": lambda *values, **named: dict(*values, **named),
    }
    del environment.globals["lipsum"]
    environment.concat = _joined  # type: ignore[method-assign]
    return environment


def _counted(name: str, does: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose work is counted."""
    first = int(hasattr(does, "jinja_pass_arg"))

    @wraps(does)
    def counted(*arguments: Any, **named: Any) -> Any:
        _work.spend(_CALL)
        subject, *others = (*arguments[first:], *named.values())
        _forecast(name, subject if isinstance(subject, str | list | tuple | dict) else "", others)
        if name not in ("length", "count", "first", "last"):
            _sized(subject)
        return _sized(does(*arguments, **named), spend=True)

    return counted


def _forecast(name: str, subject: Any, arguments: Iterable[Any]) -> None:
    """Rejects calls of this method or filter with too large a result; counts the work of multiplying ones."""
    given = list(arguments)
    if name in _TAKE_WIDTHS and any(isinstance(one, int) and one > _WIDEST for one in given):
        raise SecurityError(f"{name} to more than {_WIDEST:,} places")
    if name in ("format", "format_map") and isinstance(subject, str):
        if _WIDE.search(subject):
            raise SecurityError(f"a format of 10,000 places or more, {subject[:40]!r}")
        for one in given:
            _sized(one)
    if name == "translate":
        raise SecurityError("translate is not offered")
    if name == "replace" and len(given) > 1 and all(isinstance(one, str) for one in (subject, *given[:2])):
        _work.spend(subject.count(given[0]) * len(given[1]))
    if name in _MULTIPLY:
        lengths = [len(one) for one in given if isinstance(one, str | list | tuple | dict)]
        _work.spend(len(subject) * max(lengths, default=1))


def _sized(value: Any, spend: bool = False) -> Any:
    """The value itself, if it is not too large; `spend`: it was just created, so it counts as work."""
    if isinstance(value, str | bytes):
        size = len(value)
    elif isinstance(value, list | tuple | dict):
        size = _weight(value, {})
    else:
        return value
    if spend:
        _work.spend(size)
    return value


def _weight(value: Any, weight_of: dict[int, int]) -> int:
    """The number of characters and items of a value when written out."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 1
    known = weight_of.get(id(value))
    if known is None:
        weight_of[id(value)] = 0  # a value that contains itself is written as three dots
        inner = (*value, *value.values()) if isinstance(value, dict) else value
        known = 1 + sum(_weight(one, weight_of) for one in inner)
        if known > MOST_WORK:
            raise SecurityError("it makes a value that is larger than any conversation")
        weight_of[id(value)] = known
    return known


def _joined(parts: Iterable[str]) -> str:
    made = []
    for part in parts:
        _work.spend(len(part) + 1)
        made.append(part)
    return "".join(made)

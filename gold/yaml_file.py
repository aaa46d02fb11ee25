"""Reads YAML files with the line number of each key; errors are one line with the place."""

from collections.abc import Iterator
from pathlib import Path
from re import compile
from typing import Any

import yaml

from gold.errors import GoldError
from gold.files import read_text

Key = tuple[str | int, ...]

MOST_BYTES = 2**20
"""A larger file is rejected: it is no configuration."""

_MOST_VALUES = 100_000
_DEEPEST = 100


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of the 1.2 core schema; duplicate keys are rejected."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; keys are strings without duplicates."""
        line_of: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"a key must be text, got {_shown(key)}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in line_of:
                problem = f"key {key!r} is given twice, first on line {line_of[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            line_of[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


# In YAML 1.1, PyYAML's default, `precision: no` is false and `lr: 1e-5` is text.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", compile(f"^(?:{_pattern})$"), _first)


def read_yaml(path: Path, error: type[GoldError]) -> tuple[Any, dict[Key, int]]:
    """The value in a YAML file, None if it is empty, and the line, from 1, of each key.

    Raises: `error`, in one line, for a file that cannot be read, and as `parse_yaml`.
    """
    return parse_yaml(read_text(path, error, MOST_BYTES), str(path), error)


def parse_yaml(
    text: str, source: str, error: type[GoldError], numbered: bool = True
) -> tuple[Any, dict[Key, int]]:
    """The value in a YAML text, and the lines of its keys; errors name the source, and the line if `numbered`.

    Raises: `error`, in one line, for invalid YAML, a key that is not a string or is duplicated, and for a text that is
    larger than any configuration: an alias counts as much as its anchor.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, {}
        _check_size(root, {})
        return loader.construct_document(root), dict(_lines(root, ()))
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = f":{mark.line + 1}" if mark and numbered else ""
        said = fault.problem or fault.context
        if fault.context and str(said).startswith("but "):
            said = f"{fault.context}, {said}"
        raise error(f"{source}{line}: {said}") from fault
    except yaml.YAMLError as fault:
        raise error(f"{source}: is not YAML: {' '.join(str(fault).split())}") from fault
    except RecursionError:
        raise error(f"{source}: is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as fault:
        # Raised by the constructors of PyYAML for `!!int x`, `!!timestamp x` and extremely long integers.
        raise error(f"{source}: a value is not of the kind that its tag says: {str(fault)[:100]}") from fault


def _check_size(node: yaml.Node, size_of: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of values below a node, itself included, and their nesting depth."""
    known = size_of.get(id(node))
    if known is None:
        size_of[id(node)] = (0, 0)
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        below = [_check_size(child, size_of) for child in children]
        known = 1 + sum(size for size, _ in below), 1 + max((depth for _, depth in below), default=0)
        size_of[id(node)] = known
    problem = (
        "a value contains itself"
        if known == (0, 0)
        else f"more than {_MOST_VALUES:,} values"
        if known[0] > _MOST_VALUES
        else "nested too deeply"
        if known[1] > _DEEPEST
        else "a text holds a NUL"
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value
        else None
    )
    if problem is not None:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return known


def _lines(node: yaml.Node, key: Key) -> Iterator[tuple[Key, int]]:
    """Every key below a node with its line, from 1."""
    if isinstance(node, yaml.MappingNode):
        children = [(name.value, name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, value, value) for index, value in enumerate(node.value)]
    else:
        return
    for part, at, value in children:
        yield (*key, part), at.start_mark.line + 1
        yield from _lines(value, (*key, part))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

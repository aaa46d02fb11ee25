"""Overrides of a configuration: `section.key=value` arguments of the command line."""

from __future__ import annotations

from typing import Any

from gold.errors import ConfigError
from gold.schema import Key, dotted, shown
from gold.train.recipe import Term
from gold.yaml_file import parse_yaml


def apply_override(tree: dict[str, Any], override: str) -> Key:
    """Applies a `section.key=value` override to the tree; returns its key."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{named_override(override)}: expected section.key=value")
    value, _ = parse_yaml(text, named_override(override), ConfigError, numbered=False)
    if parts[0] == "objectives" and len(parts) > 1:
        tree.setdefault("objectives", [{"name": Term().name}])
    place: Any = tree
    key: Key = ()
    for part in parts[:-1]:
        step = _step(place, part, key, override)
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = {}
        place, key = place[step], (*key, step)
    step = _step(place, parts[-1], key, override)
    place[step] = value
    return (*key, step)


def _step(place: Any, part: str, key: Key, override: str) -> str | int:
    """The key or index that `part` selects in `place`."""
    if isinstance(place, dict):
        return part
    if isinstance(place, list):
        if not part.isdecimal() or int(part) >= len(place):
            last = f"the last is {len(place) - 1}" if place else "the list is empty"
            raise ConfigError(f"{named_override(override)}: there is no {dotted((*key, part))}: {last}")
        return int(part)
    raise ConfigError(f"{named_override(override)}: {dotted(key)} is {shown(place, key)}, which has no keys")


def named_override(override: str) -> str:
    """The name of an override in errors, without its value if that may be a misplaced secret."""
    name, equals, _ = override.partition("=")
    if not name.strip().startswith(("teacher", "rollout.engine")):
        return f"override {override}"
    return f"override {name}=…" if equals else "override teacher…"

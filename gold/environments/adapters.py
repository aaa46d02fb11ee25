"""Environments by name, and those made of verifiers and of other projects' environments."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from gold.environments.calling import reason_of
from gold.environments.protocol import CompletionVerifier, Conversation, Environment
from gold.environments.text import ToolsAsText
from gold.environments.tools import ToolEnvironment
from gold.errors import ConfigError, GoldError


class OneTurn:
    """A verifier, or a task of reasoning-gym, as an environment that ends after the student's first turn."""

    def __init__(self, verifier: CompletionVerifier) -> None:
        self.verifier = verifier

    def reply(self, conversation: Conversation) -> None:
        """None: the conversation has one turn."""
        return

    def score(self, conversation: Conversation) -> float:
        """The verifier's score of the turn without its thinking; 0 if it reached the length limit."""
        if conversation.ended == "cut":
            return 0.0
        return self.verifier.score(conversation.prompt, conversation.answer)


def is_environment(found: object) -> bool:
    """Whether an object answers turns and scores conversations."""
    return callable(getattr(found, "reply", None)) and callable(getattr(found, "score", None))


def environment_for(
    verifier: CompletionVerifier | None, source: Mapping[str, Any] | None
) -> Environment | None:
    """The environment of a configuration, ``source`` the arguments of ``load_environment``; without these the task, if
    it is an environment itself, or None.

    Raises:
        ConfigError: see ``load_environment``.
    """
    if source is not None:
        return load_environment(verifier=verifier, **source)
    return cast(Environment, verifier) if is_environment(verifier) else None


def load_environment(
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    tools: Sequence[str] = (),
    verifier: CompletionVerifier | None = None,
    tool_format: str = "template",
) -> Environment:
    """The environment of a configuration: functions as ``tools``, each ``module:function`` or ``file.py:function``, or
    the class ``name`` in the same form, made with ``options``; without either, the task itself or one turn. With the
    ``tool_format`` `text` its tools are text in messages.

    Raises:
        ConfigError: a name that cannot be loaded, or options that it does not take.
    """
    found = _loaded(name, options or {}, tools, verifier)
    return ToolsAsText(found) if tool_format == "text" else found


def _loaded(
    name: str | None,
    options: Mapping[str, Any],
    tools: Sequence[str],
    verifier: CompletionVerifier | None,
) -> Environment:
    if tools:
        modules: dict[str, Any] = {}
        return ToolEnvironment([_function(tool, modules) for tool in tools], verifier)
    if name is None:
        if is_environment(verifier):
            return cast(Environment, verifier)
        if verifier is None:
            raise ConfigError("environment: give tools, or the name of an environment")
        return OneTurn(verifier)
    kind = load_object(name, "environment.name")
    try:
        made = kind(**options) if inspect.isclass(kind) or callable(kind) else kind
    except GoldError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"environment.options: {name} does not take these options: {reason_of(error)}"
        ) from error
    if not is_environment(made):
        raise ConfigError(f"environment.name: {name} has no methods reply and score")
    return cast(Environment, made)


def _function(name: str, modules: dict[str, Any]) -> Any:
    found = load_object(name, "environment.tools", modules)
    if not callable(found):
        raise ConfigError(f"environment.tools: {name} is no function")
    return found


def load_object(name: str, key: str, modules: dict[str, Any] | None = None) -> Any:
    """What ``module:attribute`` or ``file.py:attribute`` names. ``modules`` keeps what is imported, so that several
    names of one file share its module.

    Raises:
        ConfigError: there is no such thing; the message begins with the key.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute.isidentifier():
        raise ConfigError(f"{key}: expected module:name or file.py:name, got {name!r}")
    modules = {} if modules is None else modules
    try:
        module = modules[source] if source in modules else modules.setdefault(source, _module(source))
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise ConfigError(f"{key}: {source} cannot be imported: {reason_of(error)}") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{key}: {source} has no {attribute}")
    return getattr(module, attribute)


def _module(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    file = Path(source).resolve()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no file {source}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    spec.loader.exec_module(module)
    return module

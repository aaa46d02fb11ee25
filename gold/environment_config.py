"""The configuration of environments: `environment`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from gold.schema import Text
from gold.sections import Limits


class EnvironmentConfig(Limits):
    """What answers the student's turns, so that a rollout is a conversation; see docs/conversations.md. A task that is
    an environment itself, such as calculator, needs no keys."""

    tools: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """functions that the student may call, as module:function or file.py:function"""
    name: Text | None = None
    """class of an environment, as module:Class or file.py:Class, instead of tools; null: the task"""
    options: dict[str, JsonValue] = Field(default={})
    """arguments of that class"""
    tool_format: Literal["template", "text"] = "template"
    """how tools, calls and results are written: by each side's chat template, or as plain text in messages"""

    @property
    def source(self) -> dict[str, Any]:
        """What names the environment: the arguments of ``load_environment``."""
        return {name: getattr(self, name) for name in ("name", "options", "tools", "tool_format")}

    @model_validator(mode="after")
    def _one_source(self) -> EnvironmentConfig:
        if self.tools and self.name is not None:
            raise ValueError("tools and name are two environments: keep one")
        if self.options and self.name is None:
            raise ValueError("options are of the class that name gives: give a name, or leave them out")
        return self

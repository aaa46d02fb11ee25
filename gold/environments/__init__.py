"""Environments: what answers the student's turns in a conversation, and scores it."""

from gold.environments.adapters import OneTurn, load_environment
from gold.environments.of_verifiers import VerifiersEnvironment
from gold.environments.protocol import Conversation, Environment, Limits
from gold.environments.tools import ToolEnvironment

__all__ = [
    "Conversation",
    "Environment",
    "Limits",
    "OneTurn",
    "ToolEnvironment",
    "VerifiersEnvironment",
    "load_environment",
]

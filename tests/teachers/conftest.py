"""The models of the tests of served teachers, and the tokenizer files of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import support.tiny_models as tiny

from gold.models.language_model import LanguageModel


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return tiny.tiny_student()


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return tiny.tiny_teacher()


@pytest.fixture(scope="module")
def folder(teacher: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's tokenizer, and nothing else of it."""
    path = tmp_path_factory.mktemp("tokenizer")
    teacher.tokenizer.save_pretrained(path)
    return path

"""Models from files, with the roles of special tokens that a configuration names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from support.tokenizer_files import byte_level_gguf, description
from support.tokenizers import byte_level_bpe

from gold.build import roles_of
from gold.config import Config
from gold.data import Prompt
from gold.errors import ModelError, VocabularyError
from gold.models import pretrained
from gold.models.files import check_files
from gold.models.load import gguf_tokenizer, load_model, save_model
from gold.tokenize.chat import prompt_ids
from gold.tokenize.roles import Roles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    tiny.save_pair(found)
    return found / "student"


def special(model: Any) -> dict[str, int]:
    return {token.content: index for index, token in model.tokenizer.added_tokens_decoder.items()}


def test_named_roles_reach_the_tokenizer_and_what_is_saved(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, device="cpu")
    ids = special(model)
    stop, other = (
        model.vocabulary.stop_ids[0],
        next(i for i in ids.values() if i not in model.vocabulary.stop_ids),
    )
    names = {index: token for token, index in ids.items()}
    roles = Roles(stop=(names[other],), bos=names[stop], pad=names[other])
    changed = load_model(folder, device="cpu", roles=roles)
    save_model(changed, tmp_path)
    again = load_model(tmp_path, device="cpu")
    for each in (changed, again):
        assert other in each.vocabulary.stop_ids
        assert each.lm.generation_config.eos_token_id == [other]
        assert (each.vocabulary.bos_id, each.pad_id) == (stop, other)
        text = prompt_ids(each.tokenizer, Prompt("a", " 24 +7"))
        assert (text[0], text.count(stop)) == (stop, 1)
    assert changed.vocabulary.stop_ids == (other,)


def test_a_role_for_a_token_that_is_not_there_is_told_before_weights_are_read(folder: Path) -> None:
    with pytest.raises(VocabularyError, match=r"^roles\.stop: .*student has no token '<\|end\|>'; "):
        load_model(folder, roles=Roles(stop=["<|end|>"]))


def test_roles_in_a_configuration(folder: Path) -> None:
    settings = tiny.run_settings(
        folder.parent, Path("run"), student__roles={"stop": ["<eos>"], "bos": "<bos>"}
    )
    config = Config.model_validate(settings)
    assert roles_of(config.student) == Roles(("<eos>",), "<bos>", None)
    assert roles_of(config.teacher) == Roles()
    assert Config.model_validate(json.loads(json.dumps(config.to_dict()))) == config


def test_a_gguf_file_by_its_own_path(tmp_path: Path) -> None:
    file = byte_level_gguf(tmp_path / "m.gguf", description(byte_level_bpe()), "gpt-2", eos_token_id=1)
    check_files(file)
    with pytest.raises(ModelError, match=r"no file n\.gguf in it"):
        check_files(tmp_path / "n.gguf")
    with pytest.raises(ModelError, match="no such folder"):
        check_files(tmp_path / "none" / "n.gguf")


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content + '<eos>' }}{% endfor %}"
    keys = {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True, "chat_template": template}
    original = byte_level_bpe(digits=True)
    byte_level_gguf(tmp_path / "m.gguf", description(original), "smollm", **keys)
    tokenizer = gguf_tokenizer(tmp_path, "m.gguf")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        assert each.encode("a 1234") == [0, *original.encode("a 1234", add_special_tokens=False).ids]
        assert (each.bos_token, each.eos_token, each.pad_token, each.chat_template) == (
            "<bos>",
            "<eos>",
            None,
            template,
        )
    (tmp_path / "m.gguf").write_bytes(b"nothing")
    with pytest.raises(VocabularyError, match=r"m\.gguf is no GGUF file"):
        gguf_tokenizer(tmp_path, "m.gguf")


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_the_dtype_of_the_file_where_the_processor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    model = tiny.tiny_student()
    model.lm.to(torch.bfloat16)
    save_model(model, tmp_path)
    monkeypatch.setattr(pretrained, "cpu_has_bf16", lambda: fast)
    assert load_model(tmp_path, device="cpu", dtype="auto").lm.dtype == (
        torch.bfloat16 if fast else torch.float32
    )
    assert load_model(tmp_path, device="cpu", dtype="bfloat16").lm.dtype == torch.bfloat16

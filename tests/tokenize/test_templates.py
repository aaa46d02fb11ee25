"""Chat templates without transformers: what it would render, in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from support.tokenizers import BOS_ID, EOS_ID, byte_level_bpe, sentencepiece_bpe

from benchmarks.assets import assets_folder
from gold.data import Prompt
from gold.errors import DataError
from gold.tokenize.chat import prompt_ids
from gold.tokenize.sandbox import compiled_template
from gold.tokenize.templates import PromptTokenizer, rendered
from gold.tokenize.vocabulary import Vocabulary

CONVERSATIONS = [
    [("user", "the dog")],
    [("system", " Be brief. "), ("user", "a <eos> b"), ("assistant", "x"), ("user", "é日\n  <bos>")],
]
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m.content }}{{ eos_token }}\n{% endfor %}",
    "blocks on lines": """\
{% for m in messages %}
    {% if m.role == 'user' %}
    U {{ m.content | trim }}
    {% else %}
    {{ m | tojson }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}>{% endif %}
""",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "generation": (
        "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}"
    ),
    "names that are not there": "{{ tools }}{{ nothing }}{{ unk_token }}{% if not documents %}d{% endif %}",
    "dict": "{{ dict(a=1) | tojson(indent=2) }}{{ strftime_now('%Y') }}",
}


def folder_of(path: Path, template: str | None = None, **settings: Any) -> str:
    byte_level_bpe().save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "__type": "AddedToken"}} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return str(path)


def prompt(messages: list[tuple[str, str]]) -> Prompt:
    return Prompt("p", messages=tuple({"role": role, "content": content} for role, content in messages))


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_as_transformers_does(tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    source = folder_of(tmp_path, TEMPLATES[name])
    mine = PromptTokenizer.of(Vocabulary.load(source))
    theirs = PreTrainedTokenizerFast.from_pretrained(source)
    for messages in CONVERSATIONS:
        given = [{"role": role, "content": content} for role, content in messages]
        for generation in (False, True):
            expected = theirs.apply_chat_template(given, add_generation_prompt=generation, tokenize=False)
            assert rendered(mine, given, add_generation_prompt=generation) == expected
            assert rendered(theirs, given, add_generation_prompt=generation) == expected
        asked = prompt(messages)
        # Templates that change a message cannot keep what looks like a special token in it; both refuse it.
        assert _ids_or_error(mine, asked) == _ids_or_error(theirs, asked)


def _ids_or_error(tokenizer: Any, asked: Prompt) -> list[int] | str:
    try:
        return prompt_ids(tokenizer, asked)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    ("settings", "file", "expected"),
    [
        ({"chat_template": "a"}, None, "a"),
        ({"chat_template": "a"}, "b", "b"),
        (
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
            None,
            "d",
        ),
        ({}, None, None),
    ],
)
def test_the_template_is_where_transformers_looks(
    tmp_path: Path, settings: dict[str, Any], file: str | None, expected: str | None
) -> None:
    vocabulary = Vocabulary.load(folder_of(tmp_path, file, **settings))
    assert PromptTokenizer.of(vocabulary).chat_template == expected


def test_without_a_template_it_is_the_plain_transcript(tmp_path: Path) -> None:
    sentencepiece_bpe().save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.load(str(tmp_path / "tokenizer.json"))
    bos, *ids = prompt_ids(PromptTokenizer.of(vocabulary), prompt([("user", "a <eos> b")]))
    assert bos == vocabulary.bos_id
    assert vocabulary.decode(ids).data == b"User: a <eos> b\n\nAssistant:"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n['_x'] = 1 %}",
        "{{ dict.mro() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('refused') }}",
        "{% if %}",
    ],
)
def test_a_template_is_a_program_in_a_sandbox(template: str) -> None:
    with pytest.raises(TemplateError):
        raise AssertionError(compiled_template(template).render(messages=[]))


def test_a_broken_settings_file_is_named(tmp_path: Path) -> None:
    vocabulary = Vocabulary.load(folder_of(tmp_path))
    for content in (b"{", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer_config\.json is no"):
            PromptTokenizer.of(vocabulary)


def test_without_settings_the_roles_name_the_special_tokens() -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    vocabulary = Vocabulary(byte_level_bpe(), stop_ids=[EOS_ID], bos_id=BOS_ID, chat_template=template)
    ids = prompt_ids(PromptTokenizer.of(vocabulary), prompt([("user", "the <eos> dog")]))
    assert (ids[0], ids[-1]) == (BOS_ID, EOS_ID)
    assert vocabulary.decode(ids[1:-1]).data == b"the <eos> dog"
    assert ids.count(EOS_ID) == 1


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(
    "name",
    [
        *("smollm2-135m-instruct", "gemma3-270m", "tokenizers/qwen3", "tokenizers/llama3_1"),
        *("tokenizers/deepseek_v3", "tokenizers/gptoss", "tokenizers/llama2", "tokenizers/gemma3"),
    ],
)
def test_real_prompts_are_those_of_transformers(name: str) -> None:
    from transformers import AutoTokenizer

    folder = assets_folder() / name
    mine = PromptTokenizer.of(Vocabulary.load(str(folder)))
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS:
        asked = prompt([(role, f"{content} <|im_end|> <|eot_id|>") for role, content in messages])
        assert prompt_ids(mine, asked) == prompt_ids(theirs, asked)

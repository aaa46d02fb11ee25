"""What a chat template writes after an assistant's answer, whatever the template looks like."""

import pytest
from tokenizers import Tokenizer, models

from benchmarks.assets import tokenizer_path
from gold.tokenize.load import open_source
from gold.tokenize.roles import turn_ends

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NAMES = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>"),
    *("<|user|>", "<|assistant|>", "<|eot", "<|eot_id|>", "<think>", "</think>", "<end_of_turn>"),
)
TOKENIZER = Tokenizer(models.BPE())
TOKENIZER.add_special_tokens(list(NAMES))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def ends(template: str) -> list[str]:
    return [NAMES[index] for index in turn_ends(template, TOKENS, TOKENIZER)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["<|im_end|>"]),
        (CHATML.replace("m.content", "m.content | trim"), ["<|im_end|>"]),
        (CHATML.replace("m.content", "m['content'][0]['text']"), ["<|im_end|>"]),
        (CHATML.replace("'<|im_end|>", "' \n\n<|im_end|>"), ["<|im_end|>"]),
        # As a variable; and beside a BOS that opens the next turn.
        ("{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}", ["</s>"]),
        # In thoughts before the answer nothing ends.
        ("{% for m in messages %}<think>\n</think>{{ m.content }}<|im_end|>{% endfor %}", ["<|im_end|>"]),
        # The longest of the tokens that could stand there.
        ("{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", ["<|eot_id|>"]),
        # The last message ends otherwise than those before it (gpt-oss).
        (
            "{% for m in messages %}<|channel|>final<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
            ["<|return|>"],
        ),
        # A turn ends where the next one begins (GLM-4).
        ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}", ["<|user|>"]),
        # Nothing but text, or a BOS, between the turns.
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", []),
        ("{% for m in messages %}{{ bos_token + m.content }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content }} (end)<|im_end|>{% endfor %}", []),
        # Marks of what the assistant wrote; names that transformers gives a template.
        (
            "{% for m in messages %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endfor %}"
            "{{ strftime_now('%Y') }}{% if false %}{{ raise_exception('x') }}{% endif %}",
            ["<|end|>"],
        ),
        # A template that cannot be rendered: what of the known endings stands in it.
        ("{{ raise_exception('no') }}<|im_end|> <|return|>", ["<|im_end|>", "<|return|>"]),
        ("{% unheard_of %}<end_of_turn>", ["<end_of_turn>"]),
        ("{{ 1 // 0 }}", []),
        ("", []),
    ],
)
def test_what_ends_a_turn(template: str, expected: list[str]) -> None:
    assert ends(template) == expected


def test_a_template_reaches_nothing_outside() -> None:
    assert ends("{{ messages.__class__.__mro__ }}<|im_end|>") == ["<|im_end|>"]  # refused, so not rendered


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            name,
            expected,
            marks=[pytest.mark.assets(name), *([pytest.mark.slow] if name == "gemma3" else [])],
        )
        for name, expected in (
            ("qwen3", "<|im_end|>"),
            ("llama3_1", "<|eot_id|>"),
            ("gemma3", "<end_of_turn>"),
            ("deepseek_v3", "<｜end▁of▁sentence｜>"),
            ("smollm2-135m-instruct", "<|im_end|>"),
        )
    ],
)
def test_the_templates_of_real_models(name: str, expected: str) -> None:
    found = open_source(tokenizer_path(name))
    assert found.chat_template is not None
    index = found.tokenizer.token_to_id(expected)
    assert turn_ends(found.chat_template, TOKENS, found.tokenizer) == (index,)
    assert index in found.stop_ids

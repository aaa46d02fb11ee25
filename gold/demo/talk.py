"""A tiny pair that talks with tools: two tokenizers, two chat templates, and the right turns of the calculator task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gold.data import Prompt
from gold.demo.calculator import Calculator
from gold.demo.models import SPECIAL, tiny_model
from gold.environments.protocol import tools_of
from gold.models.language_model import LanguageModel
from gold.turns import TurnMessage, TurnPrompt, tool_call

CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
)
STUDENT_TEMPLATE = (
    "{% if tools %}<bos>tools {% for t in tools %}{{ t.function.name }}{% endfor %}<eos>\n{% endif %}"
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}" + CALLS + "<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
TEACHER_TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}"
    "{% elif m.role == 'tool' %}={{ m.content }}"
    "{% elif m.role == 'system' %}S:{{ m.content }}"
    "{% else %}A:{{ m.content }}"
    + CALLS
    + "<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
# A call in another form than the student's.
OTHER_TEMPLATE = TEACHER_TEMPLATE.replace(
    CALLS,
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}",
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate((*SPECIAL, *symbols))}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def pair_tokenizer(texts: Sequence[str], size: int = 400, *, phrases: bool = False) -> Tokenizer:
    """Byte-level BPE of the texts, digits by themselves; ``phrases``: without bounds between words, so that a phrase of
    a template is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not phrases),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def with_template(model: LanguageModel, template: str) -> LanguageModel:
    """The model with a chat template."""
    model.tokenizer.chat_template = template
    return model


def talking_student(seed: int = 1, **sizes: Any) -> LanguageModel:
    """Random weights; its tokens are pieces of the task's texts."""
    texts = [text for prompt in Calculator().prompts("train", 50, 3) for text in lesson(prompt)]
    model = tiny_model(
        pair_tokenizer(texts), "student", seed=seed, **{"layers": 1, "width": 32, "context": 512, **sizes}
    )
    return with_template(model, STUDENT_TEMPLATE)


def talking_teacher(seed: int = 2, template: str = TEACHER_TEMPLATE, **sizes: Any) -> LanguageModel:
    """Random weights; its tokens are bytes."""
    model = tiny_model(
        byte_tokenizer(), "teacher", seed=seed, **{"layers": 1, "width": 32, "context": 512, **sizes}
    )
    return with_template(model, template)


def lesson(prompt: Prompt) -> tuple[str, str]:
    """The right turns of a question: the call, and the answer."""
    a, b = prompt.reference
    call = f'<tool_call>{{"name": "multiply", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'
    return call, str(a * b)


def lessons(prompt: Prompt) -> list[TurnPrompt]:
    """Both turns of a question as prompts with their right completions."""
    a, b = prompt.reference
    call, answer = lesson(prompt)
    asked, tools = prompt.messages or (), tools_of(Calculator())
    called: TurnMessage = {
        "role": "assistant",
        "content": "",
        "tool_calls": [tool_call("multiply", {"a": a, "b": b})],
    }
    result: TurnMessage = {"role": "tool", "name": "multiply", "content": answer}
    each: dict[str, Any] = {"tools": tools, "given": len(asked), "reference": prompt.reference}
    return [
        TurnPrompt(prompt.key, messages=asked, completion=call, **each),
        TurnPrompt(f"{prompt.key} =", messages=(*asked, called, result), completion=answer, **each),
    ]

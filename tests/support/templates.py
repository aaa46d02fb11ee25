"""Chat templates of well-known families, as their models have them without dates and defaults, and a tokenizer with the
special tokens of all of them."""

from __future__ import annotations

import json
from functools import lru_cache

from gold.demo.talk import byte_tokenizer
from gold.tokenize.templates import PromptTokenizer
from gold.tokenize.vocabulary import Vocabulary

_HERMES = (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "'
    '{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_NAMES = "{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}"

CHATML = (
    "{% if tools %}<|im_start|>system\n" + _NAMES + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + _HERMES + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
    + _NAMES
    + "<|eot_id|>"
    "{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% if tools %}[AVAILABLE_TOOLS]" + _NAMES + "[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]"
    "{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}</s>"
    "{% else %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% endif %}{% endfor %}"
)
GPTOSS = (
    "{% if tools %}<|start|>developer<|message|>"
    + _NAMES
    + "<|end|>{% endif %}{% set ns = namespace(final=-1) %}"
    "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
    "{% set ns.final = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and (loop.index0 > ns.final or loop.last) %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant<|channel|>commentary to=functions.{{ m.tool_calls[0].function.name }} "
    "<|constrain|>json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
QWEN3 = (
    "{% if tools %}<|im_start|>system\n" + _NAMES + "<|im_end|>\n{% endif %}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (m.reasoning_content or loop.last) %}"
    "<think>\n{{ (m.reasoning_content or '').strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ m.content.lstrip('\n') }}" + _HERMES + "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN3_CODER = CHATML.replace(
    _HERMES,
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    "<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}",
)
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>"),
    "gpt-oss": (GPTOSS, "<|return|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "qwen3-coder": (QWEN3_CODER, "<|im_end|>"),
}
"""The template of each family, and the token that ends a turn."""
_MARKS = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    *("<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]"),
    *("[/SYSTEM_PROMPT]", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"),
    "<|return|>",
)


@lru_cache
def family(name: str) -> tuple[Vocabulary, PromptTokenizer]:
    """A tokenizer of bytes with the template and the special tokens of a family."""
    template, end = FAMILIES[name]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(list(_MARKS))
    stops = [end, "<|call|>"] if name == "gpt-oss" else [end]
    vocabulary = Vocabulary(
        tokenizer, stop_ids=[tokenizer.token_to_id(stop) for stop in stops], name=name, chat_template=template
    ).with_markers()
    return vocabulary, PromptTokenizer(vocabulary)


def turn_of(name: str, thinking: str | None, prose: str, call: tuple[str, str] | None) -> str:
    """A turn as a model of the family writes it; the arguments of a call are JSON."""
    if name == "gpt-oss":
        before = (
            "" if thinking is None else f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant"
        )
        if call is None:
            return f"{before}<|channel|>final<|message|>{prose}"
        return f"{before}<|channel|>commentary to=functions.{call[0]} <|constrain|>json<|message|>{call[1]}"
    before = "" if thinking is None else f"<think>\n{thinking}\n</think>\n\n"
    if call is None:
        return before + prose
    if name == "llama3":
        return f'{before}{{"name": "{call[0]}", "parameters": {call[1]}}}'
    if name == "mistral":
        return f"{before}{prose}[TOOL_CALLS]{call[0]}[ARGS]{call[1]}"
    if name == "qwen3-coder":
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in json.loads(call[1]).items()}
        each = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        text = f"<tool_call>\n<function={call[0]}>\n{each}</function>\n</tool_call>"
        return f"{before}{prose}\n{text}" if prose else before + text
    text = f'<tool_call>\n{{"name": "{call[0]}", "arguments": {call[1]}}}\n</tool_call>'
    return f"{before}{prose}\n{text}" if prose else before + text

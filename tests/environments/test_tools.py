"""Functions as tools: their schemas, their results as text, and every way in which a call goes wrong."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from transformers.utils import get_json_schema

from gold.data import Prompt
from gold.demo.calculator import Calculator, multiply
from gold.environments import Conversation, Limits, OneTurn, ToolEnvironment, load_environment
from gold.environments.calling import Caller
from gold.environments.protocol import tools_of
from gold.environments.text import ToolsAsText
from gold.errors import ConfigError
from gold.turns import read_turn

ASKED = Prompt("k", messages=({"role": "user", "content": "q"},), reference="4")


def conversation(*texts: str, ended: str | None = "done") -> Conversation:
    found = Conversation(ASKED, [{"role": "user", "content": "q"}], ended=ended)
    found.turns = [read_turn(text.encode()) for text in texts]
    return found


def replies(environment, *texts: str):
    found = conversation(*texts, ended=None)
    (reply,) = Caller(5.0).results([lambda: environment.reply(found)])
    return reply, found.counts


async def slow(a: int) -> dict[str, int]:
    """Waits.

    Args:
        a: A number.
    """
    await asyncio.sleep(0.01)
    return {"a": a}


def broken(a: int) -> int:
    """Fails.

    Args:
        a: A number.
    """
    raise ZeroDivisionError(f"{a} by\nzero")


def half() -> str:
    """Half a surrogate pair."""
    return "a\ud83d"


class Exact:
    def score(self, prompt, completion):
        return float(completion.strip() == prompt.reference)


def test_the_schema_of_a_function_is_that_of_transformers() -> None:
    schema = get_json_schema(multiply)
    schema["function"].pop("return")
    assert ToolEnvironment([multiply]).tools == (schema,)
    assert schema["function"]["parameters"]["required"] == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "result", "failed"),
    [
        ('{"name": "multiply", "arguments": {"a": 6, "b": 7}}', "42", 0),
        ('{"name": "slow", "arguments": {"a": 6}}', '{"a": 6}', 0),
        ('{"name": "broken", "arguments": {"a": 6}}', "error: ZeroDivisionError: 6 by zero", 1),
        (
            '{"name": "divide", "arguments": {}}',
            "there is no tool 'divide'; the tools are multiply, slow, broken, half",
            1,
        ),
        ('{"name": "multiply", "arguments": {"x": 6}}', "unexpected keyword argument", 1),
        ('{"name": "multiply", "arguments": {"a": 6}}', "missing 1 required", 1),
        ('{"name": "multiply", "arguments": 7}', "error: the arguments are no JSON object", 1),
        ('{"name": "multiply"', "error: the call is no JSON", 1),
        ('{"name": "half", "arguments": {}}', "a\ufffd", 0),
    ],
)
def test_the_result_of_a_call_is_text_and_a_failure_is_counted(call, result, failed) -> None:
    environment = ToolEnvironment([multiply, slow, broken, half])
    reply, counts = replies(environment, f"<tool_call>{call}</tool_call>")
    assert [m["role"] for m in reply] == ["tool"]
    assert result in reply[0]["content"]
    assert (counts["tool_calls"], counts["tool_errors"]) == (1, failed)


def test_arguments_between_markers_are_read_as_the_schema_says() -> None:
    def count(text: str, times: int, parts: list[str]) -> str:
        """Counts.

        Args:
            text: A text.
            times: A number.
            parts: Some texts.
        """
        return repr((text, times, parts))

    environment = ToolEnvironment([count])
    for times, told in (("3", "('7', 3, ['x'])"), ("three", "error: JSONDecodeError")):
        values = {"text": "7", "times": times, "parts": '["x"]'}
        each = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        reply, counts = replies(
            environment, f"<tool_call>\n<function=count>\n{each}</function>\n</tool_call>"
        )
        assert told in reply[0]["content"]
        assert counts["tool_errors"] == (times == "three")


def test_an_argument_that_may_be_a_text_needs_no_json() -> None:
    def find(a: int | str, b: str | list[int], c: Any, d: str | None = None) -> str:
        """Finds.

        Args:
            a: A number, or a name.
            b: A name, or numbers.
            c: Anything.
            d: A text.
        """
        return repr((a, b, c, d))

    environment = ToolEnvironment([find])
    for values, told in (
        (("x", "y", "z", "7"), "('x', 'y', 'z', '7')"),
        (("7", "[7]", "[7]", ""), "(7, [7], [7], '')"),
    ):
        each = "".join(f"<parameter={k}>{v}</parameter>" for k, v in zip("abcd", values, strict=True))
        reply, counts = replies(environment, f"<tool_call><function=find>{each}</function></tool_call>")
        assert (reply[0]["content"], counts["tool_errors"]) == (told, 0)


def test_a_turn_without_calls_ends_the_conversation_and_is_scored_without_its_thinking() -> None:
    environment = ToolEnvironment([multiply], Exact())
    assert replies(environment, "4")[0] is None
    assert environment.score(conversation("x", "<think>3?</think>\n\n4")) == 1.0
    assert environment.score(conversation("4", ended="max_turns")) == 0.0
    assert ToolEnvironment([multiply]).score(conversation("4")) is None


def test_tools_as_text_are_described_in_a_system_message_and_answered_by_the_user() -> None:
    environment = ToolsAsText(ToolEnvironment([multiply], Exact()))
    assert tools_of(environment) == ()
    assert '"name": "multiply"' in environment.instructions
    call = '<tool_call>{"name": "multiply", "arguments": {"a": 2, "b": 3}}</tool_call>'
    assert replies(environment, call + call)[0] == [
        {"role": "user", "content": "\n".join(["<tool_response>\n6\n</tool_response>"] * 2)}
    ]
    assert replies(environment, "4")[0] is None
    (score,) = Caller(5.0).results([lambda: environment.score(conversation("4"))])
    assert score == 1.0


def test_many_calls_run_at_once_and_one_that_hangs_ends_alone() -> None:
    caller, begun = Caller(0.6), time.monotonic()
    found = caller.results([lambda: time.sleep(5), *[lambda n=n: time.sleep(0.1) or n for n in range(20)]])
    assert isinstance(found[0], TimeoutError)
    assert found[1:] == list(range(20))
    assert time.monotonic() - begun < 4


def test_an_error_of_a_call_is_its_result() -> None:
    found = Caller(5.0).results([lambda: 1 / 0, lambda: 2, lambda: next(iter(()))])
    assert isinstance(found[0], ZeroDivisionError)
    assert found[1] == 2
    assert isinstance(found[2], RuntimeError)


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt()])
def test_a_call_that_would_end_the_program_fails_alone(raised) -> None:
    def plain():
        raise raised

    async def coroutine():
        raise raised

    async def inner():
        return await coroutine()

    found = Caller(5.0).results([plain, coroutine, inner, lambda: coroutine(), lambda: 2])
    assert [str(error) for error in found[:4]] == [type(raised).__name__] * 4
    assert found[4] == 2


def test_a_coroutine_that_holds_up_all_others_is_one_line() -> None:
    async def sleeps(s: float) -> float:
        time.sleep(s)
        return s

    async def waits() -> int:
        await asyncio.sleep(0.3)
        return 1

    assert Caller(0.5).results([lambda: sleeps(0.4)] * 6)[0] == 0.4  # in turn: nothing to complain of
    caller = Caller(0.1)
    with pytest.raises(ConfigError, match=r"a coroutine has held up all others for more than 0\.1 s"):
        caller.results([lambda: sleeps(6.0), waits])


def undescribed(a: int) -> int:
    return a


def test_functions_that_cannot_be_tools_are_refused() -> None:
    with pytest.raises(ConfigError, match="undescribed has no schema"):
        ToolEnvironment([undescribed])
    with pytest.raises(ConfigError, match="two functions multiply"):
        ToolEnvironment([multiply, multiply])


def test_tools_of_one_file_share_its_module(tmp_path) -> None:
    file = tmp_path / "kept.py"
    tool = 'def {0}() -> int:\n    """Tool."""\n    kept.append(1)\n    return len(kept)\n'
    file.write_text("kept = []\n" + tool.format("one") + tool.format("other"))
    made = load_environment(tools=[f"{file}:one", f"{file}:other"])
    assert isinstance(made, ToolEnvironment)
    assert (made.functions["one"](), made.functions["other"]()) == (1, 2)


@pytest.mark.parametrize("name", ["tools", "name", "made"])
def test_a_file_that_ends_the_program_is_one_line(tmp_path, name) -> None:
    file = tmp_path / "ends.py"
    file.write_text("import sys\ndef f(): sys.exit(0)\n" + "sys.exit(0)\n" * (name != "made"))
    given = {"tools": {"tools": [f"{file}:f"]}}.get(name, {"name": f"{file}:f"})
    with pytest.raises(ConfigError, match=r"it ends the program \(SystemExit\)$"):
        load_environment(**given)


@pytest.mark.parametrize("tool", [5, {}, {"function": 5}, {"function": {"name": 5}}, {"name": "f"}])
def test_what_is_no_schema_is_one_line(tool) -> None:
    class Tooled(OneTurn):
        tools = (tool,)

    for use in (tools_of, ToolsAsText):
        with pytest.raises(ConfigError, match=r"tools\[0\] is no schema of a function"):
            use(Tooled(Exact()))
    Tooled.tools = None
    assert tools_of(Tooled(Exact())) == ()


def test_environments_by_name(tmp_path, monkeypatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        'def add(a: int) -> int:\n    """Adds.\n\n    Args:\n        a: x.\n    """\n    return a + 1\n'
    )
    made = load_environment(tools=[f"{file}:add"], verifier=Exact())
    assert isinstance(made, ToolEnvironment)
    assert list(made.functions) == ["add"]
    calculator = load_environment("gold.demo.calculator:Calculator", {"highest": 20})
    assert isinstance(calculator, Calculator)
    assert calculator.highest == 20
    assert load_environment(verifier=calculator) is calculator
    one = load_environment(verifier=Exact())
    assert isinstance(one, OneTurn)
    assert one.reply(conversation("4")) is None
    assert (one.score(conversation("4")), one.score(conversation("4", ended="cut"))) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "gold.nowhere:X"}, "gold.nowhere cannot be imported"),
        ({"name": "gold.data:Nothing"}, "gold.data has no Nothing"),
        ({"name": "gold.data"}, "expected module:name"),
        ({"name": "gold.data:Prompt", "options": {"key": "k", "text": "t"}}, "no methods reply and score"),
        ({"name": "gold.demo.calculator:Calculator", "options": {"high": 3}}, "does not take these options"),
        ({"tools": ["missing.py:f"]}, "missing.py cannot be imported"),
        ({"tools": ["gold.data:LINE_KEYS"]}, "is no function"),
        ({}, "give tools, or the name"),
    ],
)
def test_a_name_that_is_no_environment_is_one_line(given, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_environment(**given)
    assert "\n" not in str(caught.value)


def test_the_limits_have_defaults() -> None:
    assert Limits() == Limits(max_turns=8, max_tokens=None, timeout_s=60.0)

"""The rollout engine of a run: weights pushed to it, and the context in which it generates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from gold.activity import doing
from gold.rollout.engine import AdapterEngine, Generation, ProbedEngine, Request, RolloutEngine
from gold.rollout.thinking import within_budgets
from gold.train.setup import Setup
from gold.train.state import TrainState


def generating(state: TrainState, setup: Setup) -> AbstractContextManager[object]:
    """Context in which the engine generates: the student's own needs its whole weights."""
    stack = ExitStack()
    stack.enter_context(state.accelerator.autocast())
    if setup.student_generates:
        stack.enter_context(state.whole_student())
    return stack


def generate(setup: Setup, requests: Sequence[Request]) -> list[Generation]:
    """Completions of the run's engine, with the student's thinking ended where its budget is used up."""
    return within_budgets(setup.student, setup.engine.generate)(requests)


def begin_engine(state: TrainState, setup: Setup) -> None:
    """Pushes the student's weights before the first step of a run, or of its resumption, and tries an engine that can
    be tried.

    Raises:
        EngineError: it does not work.
    """
    engine = setup.engine
    if not isinstance(engine, ProbedEngine):
        _push(state, engine)
        return
    with doing("trying the rollout engine"), state.weights_at_hand():
        adapter = _alone(state, engine)
        weights, settings = adapter if adapter is not None else (state.gather(), None)
        state.together(partial(engine.probe, state.student, setup.prompts, weights, state.step, settings))


def push_weights(state: TrainState, engine: RolloutEngine) -> None:
    """Pushes the student's current weights to the engine, once it is idle.

    Raises:
        EngineError: no push succeeds, in any of the processes.
    """
    state.together(state.ahead.wait)
    if engine.version != state.step:
        _push(state, engine)


def _push(state: TrainState, engine: RolloutEngine) -> None:
    started = time.perf_counter()
    adapter = _alone(state, engine)
    if adapter is not None and isinstance(engine, AdapterEngine):
        weights, settings = adapter
        state.together(partial(engine.push_adapter, weights, state.step, settings))
    else:
        with state.weights_at_hand():
            state.together(partial(engine.push, state.gather(), state.step))
    state.push_s += time.perf_counter() - started


def _alone(state: TrainState, engine: RolloutEngine) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
    """The student's adapter and its settings, if it has one and the engine takes it alone."""
    return state.gather_adapter() if isinstance(engine, AdapterEngine) and engine.adapters else None

"""Calls an environment for many conversations at once: coroutines in one event loop, plain functions in threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from gold.errors import ConfigError

_MOST = 64
"""Calls at a time."""


class Caller:
    """Makes calls at once, each with a time limit in seconds. Its threads end with the process: a call that hangs holds
    nothing up. A call that runs out of time is a ``TimeoutError``."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._moves = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), name="environments", daemon=True).start()
        self.close = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        """Ends the event loop; so does the end of the object."""

    def results(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The result of each call, in order, or the exception that it raised.

        Raises:
            ConfigError: a coroutine computes or sleeps without awaiting, so that no time limit can end it.
        """
        if not calls:
            return []
        found = asyncio.run_coroutine_threadsafe(self._all(calls), self._loop)
        while not concurrent.futures.wait([found], self.timeout_s + 1).done:
            answered, before = threading.Event(), self._moves
            self._loop.call_soon_threadsafe(answered.set)
            if not answered.wait(self.timeout_s + 1) and before == self._moves and not found.done():
                raise ConfigError(
                    f"environment: a coroutine has held up all others for more than {self.timeout_s:g} s "
                    "(environment.timeout_s): make it await what takes long, or a plain function, which gets a thread"
                )
        return found.result()

    async def _all(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        turn = asyncio.Semaphore(_MOST)

        async def one(call: Callable[[], Any]) -> Any:
            async with turn:
                self._moves += 1
                try:
                    return await asyncio.wait_for(called(call), self.timeout_s)
                finally:
                    self._moves += 1

        return await asyncio.gather(*map(one, calls), return_exceptions=True)


def reason_of(error: BaseException) -> str:
    """Why code of a user could not be run, in one line."""
    if isinstance(error, SystemExit):
        return "it ends the program (SystemExit)"
    return " ".join(str(error).split()) or type(error).__name__


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Runs an event loop until it is stopped."""
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def called(call: Callable[[], Any]) -> Any:
    """The result of a call: of a coroutine function here, of any other in a thread of its own."""
    if inspect.iscoroutinefunction(getattr(call, "func", call)):
        return await _awaited(call())
    result = await _in_thread(call)
    return await _awaited(result) if isinstance(result, Awaitable) else result


async def _awaited(result: Awaitable[Any]) -> Any:
    """An awaitable's result. One that wants to end the program fails instead, as one in a thread does."""
    try:
        return await result
    except (SystemExit, KeyboardInterrupt) as raised:
        raise RuntimeError(type(raised).__name__) from None


async def _in_thread(call: Callable[[], Any]) -> Any:
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():  # its time has run out
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration):  # a future cannot hold it
            future.set_exception(RuntimeError("StopIteration"))
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as raised:
            error = raised if isinstance(raised, Exception) else RuntimeError(type(raised).__name__)
        with contextlib.suppress(RuntimeError):  # the loop may have ended meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name="environment", daemon=True).start()
    return await future

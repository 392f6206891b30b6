"""Runs a function beside the event loop, and stops it when its time is up."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class _TimeIsUp(BaseException):
    """Raised inside the thread. Not an Exception, so that nothing on the way takes it for its own."""


class TimeLimit:
    """Runs at most ``concurrency`` functions at a time, each in a thread of its own for at most ``seconds``.

    A function that runs Python code (a template's loops) is really interrupted; one inside a C call ends with it.
    """

    def __init__(self, seconds: float, concurrency: int = 4) -> None:
        self.seconds = seconds
        self._places = asyncio.Semaphore(concurrency)

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result. Raises TimeoutError, and what the function raises."""
        async with self._places:
            done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            thread = threading.Thread(target=_run, args=(function, done), name="time-limit", daemon=True)
            thread.start()
            try:
                return await asyncio.wait_for(done, self.seconds)
            except (TimeoutError, asyncio.CancelledError):
                _interrupt(thread)
                raise


def _run(function: Callable[[], T], done: "asyncio.Future[T]") -> None:
    with suppress(_TimeIsUp, RuntimeError):  # RuntimeError: the loop has closed, nobody waits
        try:
            result = function()
        except Exception as error:
            done.get_loop().call_soon_threadsafe(_fail, done, error)
        else:
            done.get_loop().call_soon_threadsafe(_finish, done, result)


def _finish(done: "asyncio.Future[T]", result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: "asyncio.Future[T]", error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


def _interrupt(thread: threading.Thread) -> None:
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeIsUp))

"""The engine's own process: makes the engine, steps it, and ends with the server, however that ends.

    python -m loraplex_server.engine.child DESCRIPTOR PARENT

DESCRIPTOR is its end of a socket pair, PARENT the server's process. One thread does it all: commands are read between
steps, and a report that the socket has no room for waits in memory, never in the way of the next step.
"""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import cast

from loraplex_server.collector import spare_what_is_there
from loraplex_server.engine.host import EngineDeath, EngineRecipe, run_engine
from loraplex_server.engine.messages import Command, StepReport
from loraplex_server.engine.wire import Ended, Frames, Loaded, Loading, NotStarted, ReportPacker, Started, pack

_CHUNK_BYTES = 1 << 18
_PROGRESS_EVERY_S = 0.1
# What the server has not read this long after the engine's end it will not read any more.
_LAST_WORDS_S = 10.0
_PR_SET_PDEATHSIG = 1
# A step waits no longer than this for a thread that reads adapters to give up the interpreter's lock (the default: 5 ms).
_SWITCH_S = 5e-4


class SocketLink:
    """The engine's end of the socket pair. See ``host.EngineLink``.

    A frame of commands holds a list of them, or None: the engine is to end.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._frames = Frames()
        self._packer = ReportPacker()
        self._unsent = bytearray()
        self._over = False
        self._wake_reader, self._wake_writer = os.pipe()
        for end in (self._wake_reader, self._wake_writer):
            os.set_blocking(end, False)
        self._progress_at = 0.0

    def recipe(self) -> EngineRecipe:
        """What the server's process says first: where to import from, and what to make. Raises EOFError."""
        has_path = False
        while data := self._socket.recv(_CHUNK_BYTES):
            for value in self._frames.feed(data):
                if has_path:
                    self._socket.setblocking(False)
                    return cast(EngineRecipe, value)
                sys.path[:] = value
                has_path = True
        raise EOFError("the server ended before it said what to make")

    def progress(self, done: int, total: int) -> None:
        """Say how far loading is, now and then."""
        now = time.monotonic()
        if done >= total or now - self._progress_at >= _PROGRESS_EVERY_S:
            self._progress_at = now
            self.say(Loading(done, total))

    def wake(self) -> None:
        """End the sleep in ``take``. For any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"x")

    def take(self, wait_s: float | None) -> Iterable[Command] | None:
        if wait_s != 0:
            self._sleep(wait_s)
        if self._unsent:
            self._send_on()
        commands: list[Command] = []
        while not self._over:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._over = True
            for value in self._frames.feed(data):
                if value is None:
                    self._over = True
                else:
                    commands += value
            if len(data) < _CHUNK_BYTES:
                break
        return None if self._over else commands

    def give(self, report: StepReport) -> None:
        self._unsent += self._packer.pack(report)
        self._send_on()

    def say(self, value: object) -> None:
        """Send anything else."""
        self._unsent += pack(value)
        self._send_on()

    def finish(self) -> None:
        """Send what is left, if anybody still reads."""
        self._socket.settimeout(_LAST_WORDS_S)
        with contextlib.suppress(OSError):
            self._socket.sendall(self._unsent)

    def _send_on(self) -> None:
        try:
            num_sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            # The server is gone.
            self._over = True
            num_sent = len(self._unsent)
        del self._unsent[:num_sent]

    def _sleep(self, wait_s: float | None) -> None:
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        waiting.register(self._wake_reader, select.POLLIN)
        for descriptor, _ in waiting.poll(None if wait_s is None else wait_s * 1000):
            if descriptor == self._wake_reader:
                os.read(self._wake_reader, 4096)


def serve_engine(link: SocketLink) -> int:
    """Make the engine and run it to its end; the exit status of the process."""
    try:
        recipe = link.recipe()
        recipe.enter_process()
        loaded = recipe.load(link.progress)
        link.say(Loaded(loaded.facts))
        engine = loaded.build(link.wake)
        spare_what_is_there()
        link.say(Started())
    except BaseException as error:
        link.say(NotStarted.of(error))
        return 1
    death = None
    try:
        run_engine(engine, link)
    except BaseException as error:
        death = EngineDeath.of(error)
    link.say(Ended(death))
    return 0 if death is None else 1


def main() -> None:
    descriptor, parent = map(int, sys.argv[1:3])
    _end_with(parent)
    # Who stops the server may signal all of its processes; the server drains first and then says when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    sys.setswitchinterval(_SWITCH_S)
    link = SocketLink(socket.socket(fileno=descriptor))
    status = serve_engine(link)
    link.finish()
    sys.stderr.flush()
    # Nothing is left to save, and taking down a CUDA context in an orderly way takes seconds.
    os._exit(status)


def _end_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it ends. Elsewhere than on Linux the socket says so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()

"""An engine in a process of its own: on a GPU, where a step leaves no time to share an interpreter's lock with HTTP."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from loraplex_server.engine.host import EngineDeath, EngineFacts, EngineNotStarted, EngineRecipe, Progress
from loraplex_server.engine.messages import Command, StepReport
from loraplex_server.engine.wire import Ended, Frames, Loaded, Loading, NotStarted, ReportUnpacker, Started, pack

_CHUNK_BYTES = 1 << 18
# What both sides may have on the way before they keep it themselves; the kernel may grant less.
_BUFFER_BYTES = 1 << 20
# An engine that was told to end fails what runs and lets go of its copies; after this it is killed.
_STOP_S = 15.0


class EngineProcess:
    """Runs the engine of ``recipe`` in a process that ends with this one. See ``host.EngineHost``.

    ``launch`` starts the process, so that other work can go on while it loads; ``load`` does so too if need be.
    """

    def __init__(self, recipe: EngineRecipe) -> None:
        self._recipe = recipe
        self._process: subprocess.Popen[bytes] | None = None
        self._socket, self._theirs = socket.socketpair()
        for end in (self._socket, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._frames = Frames()
        self._unpacker = ReportUnpacker()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._has_started = False
        self._gone: asyncio.Future[None] | None = None
        self._commands: list[Command | None] = []
        self._unsent = bytearray()
        self._end: Ended | None = None
        self._on_report: Callable[[StepReport], None] = _ignore
        self._on_end: Callable[[EngineDeath | None], None] = _ignore

    @property
    def pid(self) -> int | None:
        """The process's id, None before ``launch``."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Start the process and tell it what to make."""
        descriptor = self._theirs.fileno()
        self._process = subprocess.Popen(
            # -P: nothing of the current folder is imported by chance.
            [sys.executable, "-P", "-m", "loraplex_server.engine.child", str(descriptor), str(os.getpid())],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            # A group of its own: Ctrl-C at a terminal reaches the server alone, which then drains.
            process_group=0,
        )
        self._theirs.close()
        with suppress(OSError):  # it ended at once; load() says so
            self._socket.sendall(pack(list(sys.path)) + pack(self._recipe))

    def load(self, progress: Progress | None = None) -> EngineFacts:
        if self._process is None:
            self.launch()
        for message in self._received():
            match message:
                case Loaded(facts):
                    return facts
                case Loading(done, total) if progress is not None:
                    progress(done, total)
                case NotStarted(death, error):
                    self.close()
                    raise error or EngineNotStarted(f"the engine could not be loaded: {death.kind}: {death.message}")
        words = self._last_words()
        self.close()
        raise EngineNotStarted(f"the engine's process ended while it loaded: {words}")

    async def start(
        self, on_report: Callable[[StepReport], None], on_end: Callable[[EngineDeath | None], None]
    ) -> None:
        self._on_report, self._on_end = on_report, on_end
        loop = self._loop = asyncio.get_running_loop()
        self._started, self._gone = loop.create_future(), loop.create_future()
        self._socket.setblocking(False)
        loop.add_reader(self._socket, self._readable)
        self._take(self._frames.feed(b""))
        await self._started

    def send(self, command: Command) -> None:
        self._send(command)

    async def stop(self) -> None:
        if self._loop is None or self._gone is None:
            self.close()
            return
        self._send(None)
        try:
            await asyncio.wait_for(asyncio.shield(self._gone), _STOP_S)
        except TimeoutError:
            self.close()
            await self._gone

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._theirs.close()
        if self._loop is None:
            self._socket.close()

    # --- to the engine ----------------------------------------------------------------------------------------------

    def _send(self, command: Command | None) -> None:
        """All commands of one turn of the loop leave as one frame."""
        if self._loop is None or self._socket.fileno() < 0:
            return
        if not self._commands:
            self._loop.call_soon(self._flush)
        self._commands.append(command)

    def _flush(self) -> None:
        commands, self._commands = self._commands, []
        if self._socket.fileno() < 0:
            return
        stops = None in commands
        had_unsent = bool(self._unsent)
        self._unsent += pack([command for command in commands if command is not None])
        if stops:
            self._unsent += pack(None)
        if not had_unsent:
            self._send_on()

    def _send_on(self) -> None:
        assert self._loop is not None
        try:
            num_sent = self._socket.send(self._unsent)
        except BlockingIOError:
            num_sent = 0
        except OSError:  # it is gone; reading will say so
            num_sent = len(self._unsent)
        del self._unsent[:num_sent]
        if self._unsent:
            self._loop.add_writer(self._socket, self._send_on)
        else:
            self._loop.remove_writer(self._socket)

    # --- from the engine --------------------------------------------------------------------------------------------

    def _received(self) -> Iterator[Any]:
        """What the process says while it loads."""
        while True:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except OSError:
                return
            if not data:
                return
            yield from self._frames.feed(data)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._take(self._frames.feed(data))
        else:
            self._lost()

    def _take(self, messages: Iterator[Any]) -> None:
        for message in messages:
            if isinstance(message, tuple):
                self._on_report(self._unpacker.unpack(message))
            elif isinstance(message, Ended):
                self._end = message
            elif isinstance(message, Started):
                self._begun(None)
            elif isinstance(message, NotStarted):
                death = message.death
                what = f"the engine could not be built: {death.kind}: {death.message}"
                self._begun(message.error or EngineNotStarted(what))

    def _begun(self, error: BaseException | None) -> None:
        if self._started is None or self._started.done():
            return
        if error is None:
            self._has_started = True
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    def _lost(self) -> None:
        """The process has closed its end: it has ended, or will at once."""
        assert self._loop is not None
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._reaping = self._loop.create_task(self._reap())

    async def _reap(self) -> None:
        assert self._gone is not None
        words = await asyncio.to_thread(self._last_words)
        self._begun(EngineNotStarted(f"the engine's process ended while the engine was built: {words}"))
        if self._has_started:
            self._on_end(self._end.death if self._end else EngineDeath("EngineProcessEnded", words))
        self._gone.set_result(None)

    def _last_words(self) -> str:
        """How the process ended, waiting for it if need be."""
        assert self._process is not None
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.close()
            code = self._process.returncode
        return f"exit status {code}" if code >= 0 else f"killed by signal {-code} ({signal.strsignal(-code)})"


def _ignore(_: object) -> None:
    return None

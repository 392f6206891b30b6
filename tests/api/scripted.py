"""A worker that answers from a script, on the server's event loop, through the real token streams."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from loraplex_server.engine.messages import EngineStats, Failure, TokenOutput
from loraplex_server.engine.sequence import Request, TokenLogprob
from loraplex_server.engine.token_stream import TokenStream
from loraplex_server.engine.worker import EngineStopped, Place, QueueFull

EOS_ID = 257

Script = Callable[[Request], Iterable[TokenOutput | float]]
"""What a request gets: outputs, and between them pauses in seconds."""


def say(text: str, *, finish: str = "stop", per_output: int = 1, pause_s: float = 0.0) -> Script:
    """Answer every request with these words, a byte a token; cut off at its max_tokens."""

    def script(request: Request) -> Iterable[TokenOutput | float]:
        params = request.sampling
        ids = list(text.encode()) + ([EOS_ID] if finish == "stop" else [])
        ended = "stop" if finish == "stop" and len(ids) <= params.max_tokens else "length"
        ids = ids[: params.max_tokens]
        for begin in range(0, len(ids), per_output):
            chunk = tuple(ids[begin : begin + per_output])
            is_last = begin + per_output >= len(ids)
            scores = () if params.num_logprobs is None else tuple(score(i, params.num_logprobs) for i in chunk)
            prompt_scores = ()
            if begin == 0 and params.num_prompt_logprobs is not None:
                prompt_scores = tuple(score(i, params.num_prompt_logprobs) for i in request.prompt_ids[1:])
            yield TokenOutput(
                request.id,
                chunk,
                logprobs=scores,
                prompt_logprobs=prompt_scores,
                finish_reason=ended if is_last else None,
                stop_token_id=EOS_ID if is_last and ended == "stop" else None,
                queue_s=0.001 if begin == 0 else None,
                cached_tokens=0 if begin == 0 else None,
            )
            if pause_s:
                yield pause_s

    return script


def fail(code: str, *, after: str = "") -> Script:
    """Answer some words, then fail."""

    def script(request: Request) -> Iterable[TokenOutput | float]:
        for output in say(after, finish="length")(request) if after else ():
            assert isinstance(output, TokenOutput)
            yield replace(output, finish_reason=None)
        yield 0.02
        failure = Failure(code, f"this is {code}")  # type: ignore[arg-type]
        yield TokenOutput(request.id, (), finish_reason="error", failure=failure)

    return script


def score(token_id: int, num_top: int) -> TokenLogprob:
    """A made-up score: the token itself is the likeliest."""
    top = tuple(((token_id + i) % 256, -0.5 - i) for i in range(num_top))
    return TokenLogprob(token_id, -0.5, top)


class ScriptedWorker:
    """Has the surface of ``engine.worker.Worker``. ``requests`` and ``aborted`` say what came in."""

    def __init__(self, script: Script, *, model_len: int = 512) -> None:
        self.script = script
        self.model_len = model_len
        self.stats = EngineStats()
        self.running = False
        self.queue_full_after: int | None = None
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.running_ids: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self.running = True

    async def drain(self, timeout_s: float) -> bool:
        self.running = False
        return True

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def reserve(self) -> Place:
        self._check_room()
        return Place(lambda: None)

    def _check_room(self) -> None:
        if not self.running:
            raise EngineStopped("not running")
        if self.queue_full_after is not None and len(self.running_ids) >= self.queue_full_after:
            raise QueueFull("full", retry_after_s=2.5)

    def submit(self, request: Request) -> TokenStream:
        self._check_room()
        self.requests.append(request)
        self.running_ids.add(request.id)
        stream = TokenStream(request.id, self._abort)
        task = asyncio.get_running_loop().create_task(self._play(request, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running_ids.discard(request_id)

    async def _play(self, request: Request, stream: TokenStream) -> None:
        for output in self.script(request):
            if request.id not in self.running_ids:
                return
            if isinstance(output, float):
                await asyncio.sleep(output)
            else:
                stream.put(output)
                await asyncio.sleep(0)
        self.running_ids.discard(request.id)

"""Chat completions."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loraplex_server.api.chat_request import ChatRequest
from loraplex_server.api.choice import Piece
from loraplex_server.api.connection import ClientGone, while_connected
from loraplex_server.api.generation import Ask, Generation, Usage, reserve_place
from loraplex_server.api.logprobs import chat_logprobs
from loraplex_server.api.prompt import encode_chat, output_limit
from loraplex_server.api.request_log import note
from loraplex_server.api.sampling import for_choice, sampling_of
from loraplex_server.api.sse import EventStream, compact, quoted
from loraplex_server.api.target import check_adapter_fields
from loraplex_server.auth import Access, access
from loraplex_server.engine.worker import Place
from loraplex_server.errors import ApiError
from loraplex_server.services import Services, TemplateTime, Uses
from loraplex_server.tokenizer import Tokenizer

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", response_model=None)
@access(Access.USER)
async def create_chat_completion(
    body: ChatRequest, request: Request, services: Uses, template_time: TemplateTime
) -> Response:
    """Answer a conversation with the base model or an adapter, whole or as a stream of events."""
    begun = time.perf_counter()
    _check(body)
    with reserve_place(services, body.model) as place:
        prompt_ids = await encode_chat(services, template_time, body.messages, dict(body.chat_template_kwargs or {}))
        generation = _generation(services, body, prompt_ids, place)
    encode_s = time.perf_counter() - begun
    if body.stream:
        chunks = ChatChunks(services.tokenizer, logprobs=bool(body.logprobs), usage=body.wants_stream_usage)
        return EventStream(generation, chunks, encode_s)
    try:
        async with generation:
            answers = await while_connected(request.receive, generation.collect())
    except ClientGone:
        return Response(status_code=499)
    finally:
        if generation.outcome is not None:
            note(request.scope, **generation.facts())
    return JSONResponse(
        {
            **_head(generation, "chat.completion"),
            "choices": [_choice(services.tokenizer, body, pieces) for pieces in answers],
            "usage": generation.usage.body(),
        },
        headers=generation.headers(encode_s),
    )


def _check(body: ChatRequest) -> None:
    check_adapter_fields(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("`top_logprobs`: set `logprobs` to true as well.", param="top_logprobs", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise ApiError("`stream_options`: only for streams.", param="stream_options", code="invalid_value")


def _generation(services: Services, body: ChatRequest, prompt_ids: list[int], place: Place) -> Generation:
    max_tokens = output_limit(
        services,
        len(prompt_ids),
        body.token_limit,
        prompt_param="messages",
        limit_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    sampling = sampling_of(services, body, max_tokens=max_tokens, num_logprobs=body.num_logprobs)
    prompt = tuple(prompt_ids)
    asks = [Ask(prompt, for_choice(sampling, index), body.stops) for index in range(body.num_choices)]
    id = f"chatcmpl-{uuid.uuid4().hex}"
    return Generation(services, id, body.model, asks, place, choices_per_prompt=len(asks), salt=body.cache_salt or "")


def _head(generation: Generation, object: str) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": object,
        "created": generation.created_at,
        "model": generation.target.model,
        "system_fingerprint": generation.target.fingerprint,
    }


def _choice(tokenizer: Tokenizer, body: ChatRequest, pieces: Sequence[Piece]) -> dict[str, Any]:
    text = "".join(piece.text for piece in pieces)
    scored = [token for piece in pieces for token in piece.scored]
    return {
        "index": pieces[-1].index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": chat_logprobs(tokenizer, scored) if body.logprobs else None,
        "finish_reason": pieces[-1].finish_reason,
    }


class ChatChunks:
    """A chat answer as events: the role, the text in pieces, the reason it ended, and the usage if asked for.

    What is the same in every event of a stream is written once; an event costs one dump of its text.
    """

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool, usage: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = usage
        self._begun: set[int] = set()

    def open(self, generation: Generation) -> None:
        head = compact(_head(generation, "chat.completion.chunk"))
        self._head = f"data: {head[:-1]}"
        self._tail = '}],"usage":null}\n\n' if self._usage else "}]}\n\n"
        self._before = [f'{self._head},"choices":[{{"index":{choice.index},"delta":' for choice in generation.choices]
        self._before_text = [f'{before}{{"content":' for before in self._before]
        self._after_text = f'}},"logprobs":null,"finish_reason":null{self._tail}'

    def events(self, pieces: Sequence[Piece]) -> bytes:
        return "".join([self._events(piece) for piece in pieces]).encode()

    def _events(self, piece: Piece) -> str:
        index, text, finish_reason = piece.index, piece.text, piece.finish_reason
        if index in self._begun and finish_reason is None and not self._logprobs:
            return f"{self._before_text[index]}{quoted(text)}{self._after_text}" if text else ""
        before, events = self._before[index], []
        if index not in self._begun:
            self._begun.add(index)
            role = '{"role":"assistant","content":"","refusal":null}'
            events.append(f'{before}{role},"logprobs":null,"finish_reason":null{self._tail}')
        if text or piece.scored:
            delta = f'{{"content":{quoted(text)}}}'
            events.append(f'{before}{delta},"logprobs":{self._scores(piece)},"finish_reason":null{self._tail}')
        if finish_reason is not None:
            events.append(f'{before}{{}},"logprobs":null,"finish_reason":"{finish_reason}"{self._tail}')
        return "".join(events)

    def last(self, usage: Usage) -> bytes:
        if not self._usage:
            return b""
        return f'{self._head},"choices":[],"usage":{compact(usage.body())}}}\n\n'.encode()

    def _scores(self, piece: Piece) -> str:
        return compact(chat_logprobs(self._tokenizer, piece.scored)) if self._logprobs else "null"

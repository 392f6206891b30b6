"""Text completions: one or several prompts, as text or token ids, echoed and scored on request."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loraplex_server.api.choice import Choice, Piece, ScoredToken
from loraplex_server.api.completion_request import CompletionRequest
from loraplex_server.api.connection import ClientGone, while_connected
from loraplex_server.api.generation import Ask, Generation, Usage, reserve_place
from loraplex_server.api.logprobs import CompletionLogprobs
from loraplex_server.api.prompt import check_ids, encode_text, output_limit
from loraplex_server.api.request_log import note
from loraplex_server.api.sampling import for_choice, sampling_of
from loraplex_server.api.sse import EventStream, compact, quoted
from loraplex_server.api.target import check_adapter_fields
from loraplex_server.auth import Access, access
from loraplex_server.errors import ApiError
from loraplex_server.services import Services, Uses
from loraplex_server.tokenizer import Tokenizer

router = APIRouter(tags=["generation"])

MAX_ANSWERS = 256


@router.post("/v1/completions", response_model=None)
@access(Access.USER)
async def create_completion(body: CompletionRequest, request: Request, services: Uses) -> Response:
    """Continue one or several texts, whole or as a stream of events."""
    begun = time.perf_counter()
    _check(body)
    answers = CompletionAnswers(services.tokenizer, body)
    with reserve_place(services, body.model) as place:
        asks: list[Ask] = []
        for prompt in body.prompts:
            asks += _asks(services, body, await _prompt_ids(services, prompt))
        generation = Generation(
            services,
            f"cmpl-{uuid.uuid4().hex}",
            body.model,
            asks,
            place,
            choices_per_prompt=body.num_choices,
            salt=body.cache_salt or "",
        )
    encode_s = time.perf_counter() - begun
    if body.stream:
        return EventStream(generation, answers, encode_s)
    try:
        async with generation:
            collected = await while_connected(request.receive, generation.collect())
    except ClientGone:
        return Response(status_code=499)
    finally:
        if generation.outcome is not None:
            note(request.scope, **generation.facts())
    answers.open(generation)
    return JSONResponse(
        {
            **_head(generation),
            "choices": [answers.whole(pieces) for pieces in collected],
            "usage": generation.usage.body(),
        },
        headers=generation.headers(encode_s),
    )


def _check(body: CompletionRequest) -> None:
    check_adapter_fields(body)
    if body.stream_options is not None and not body.stream:
        raise ApiError("`stream_options`: only for streams.", param="stream_options", code="invalid_value")
    num_answers = len(body.prompts) * body.num_choices
    if num_answers > MAX_ANSWERS:
        raise ApiError(
            f"`prompt`: {num_answers} answers are asked for; {MAX_ANSWERS} are allowed in one request.",
            param="prompt",
            code="invalid_value",
        )


async def _prompt_ids(services: Services, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(await encode_text(services, prompt, param="prompt"))
    check_ids(services, prompt, param="prompt")
    return tuple(prompt)


def _asks(services: Services, body: CompletionRequest, prompt_ids: tuple[int, ...]) -> list[Ask]:
    # The engine always makes a token after the prompt; where none is wanted it is dropped.
    keep_output = body.token_limit > 0
    max_tokens = output_limit(
        services, len(prompt_ids), max(1, body.token_limit), prompt_param="prompt", limit_param="max_tokens"
    )
    sampling = sampling_of(
        services,
        body,
        max_tokens=max_tokens,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=body.logprobs if body.echo else None,
    )
    return [Ask(prompt_ids, for_choice(sampling, index), body.stops, keep_output) for index in range(body.num_choices)]


def _head(generation: Generation) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created_at,
        "model": generation.target.model,
        "system_fingerprint": generation.target.fingerprint,
    }


class CompletionAnswers:
    """Writes the answers of a text completion: whole, or as events."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._usage = body.wants_stream_usage
        self._logprobs: CompletionLogprobs | None = None
        if body.logprobs is not None:
            self._logprobs = CompletionLogprobs(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        # Of each choice that has begun: the length of the echoed text, by which its tokens are moved.
        self._echoed_chars: dict[int, int] = {}

    def open(self, generation: Generation) -> None:
        self._choices = generation.choices
        head = compact(_head(generation))
        self._head = f"data: {head[:-1]}"
        self._tail = '}],"usage":null}\n\n' if self._usage else "}]}\n\n"

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """One choice, finished."""
        index = pieces[-1].index
        text, tokens = self._echo(self._choices[index])
        text += "".join(piece.text for piece in pieces)
        tokens += [self._moved(index, token) for piece in pieces for token in piece.scored]
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs.body(tokens) if self._logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def events(self, pieces: Sequence[Piece]) -> bytes:
        return "".join([self._event(piece) for piece in pieces]).encode()

    def last(self, usage: Usage) -> bytes:
        if not self._usage:
            return b""
        return f'{self._head},"choices":[],"usage":{compact(usage.body())}}}\n\n'.encode()

    def _event(self, piece: Piece) -> str:
        text = ""
        tokens: list[ScoredToken | tuple[int, int]] = []
        if piece.index not in self._echoed_chars:
            text, tokens = self._echo(self._choices[piece.index])
        text += piece.text
        tokens += [self._moved(piece.index, token) for token in piece.scored]
        if not text and not tokens and piece.finish_reason is None:
            return ""
        scores = compact(self._logprobs.body(tokens)) if self._logprobs else "null"
        reason = compact(piece.finish_reason)
        choice = f'"index":{piece.index},"text":{quoted(text)},"logprobs":{scores},"finish_reason":{reason}'
        return f'{self._head},"choices":[{{{choice}{self._tail}'

    def _echo(self, choice: Choice) -> tuple[str, list[ScoredToken | tuple[int, int]]]:
        """The prompt's text and tokens, if they are to be echoed. The first token has no score: nothing precedes it."""
        self._echoed_chars[choice.index] = 0
        if not self._body.echo:
            return "", []
        detokenizer = self._tokenizer.detokenizer()
        texts, offsets, length = [], [], 0
        for token_id in choice.prompt_ids:
            offsets.append(length)
            texts.append(detokenizer.push_token(token_id))
            length += len(texts[-1])
        text = "".join([*texts, detokenizer.flush()])
        self._echoed_chars[choice.index] = len(text)
        if self._logprobs is None:
            return text, []
        num_unscored = len(choice.prompt_ids) - len(choice.prompt_scores)
        unscored = list(zip(choice.prompt_ids, offsets, strict=True))[:num_unscored]
        scored = zip(choice.prompt_scores, offsets[num_unscored:], strict=True)
        return text, [*unscored, *(ScoredToken(score, offset) for score, offset in scored)]

    def _moved(self, index: int, token: ScoredToken) -> ScoredToken:
        moved_by = self._echoed_chars[index]
        return ScoredToken(token.score, token.offset + moved_by) if moved_by else token

"""Prompts as token ids: encoded off the event loop when that takes long, and checked against the context."""

import asyncio
from collections.abc import Sequence
from typing import Any

from loraplex_server.api.chat_request import ChatMessage
from loraplex_server.errors import ApiError
from loraplex_server.services import Services
from loraplex_server.time_limit import TimeLimit
from loraplex_server.tokenizer import ChatTemplateError, NoChatTemplate

# Encoding a text of this many characters takes about a millisecond.
_SHORT_CHARS = 2_000


async def encode_text(services: Services, text: str, *, param: str, add_special_tokens: bool = True) -> list[int]:
    """A text's token ids. Raises ApiError (400): certainly longer than the context, or empty."""
    tokenizer = services.tokenizer
    if tokenizer.exceeds(text, services.worker.model_len):
        raise _too_long(services, f"at least {services.worker.model_len + 1}", param)
    if len(text) <= _SHORT_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


async def encode_chat(
    services: Services,
    limit: TimeLimit,
    messages: Sequence[ChatMessage],
    variables: dict[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """A conversation's token ids, by the base model's template. Raises ApiError (400)."""
    rendered = [message.for_template() for message in messages]

    def render() -> str:
        return services.tokenizer.render_chat(rendered, variables, add_generation_prompt=add_generation_prompt)

    try:
        text = await limit.run(render)
    except NoChatTemplate as error:
        raise ApiError(str(error), param="messages", code="no_chat_template") from error
    except ChatTemplateError as error:
        raise ApiError(f"`messages`: {error}.", param="messages", code="chat_template_error") from error
    except TimeoutError as error:
        message = f"`messages`: the chat template took longer than {limit.seconds:g} s on them."
        raise ApiError(message, param="messages", code="chat_template_timeout") from error
    return await encode_text(services, text, param="messages", add_special_tokens=False)


def check_ids(services: Services, ids: Sequence[int], *, param: str) -> None:
    """Raises ApiError (400) for ids that the model has no embedding for."""
    size = services.base.vocab_size
    if ids and max(ids) >= size:
        raise ApiError(f"`{param}`: token ids must be below {size}.", param=param, code="invalid_value")


def output_limit(services: Services, num_prompt: int, asked: int | None, *, prompt_param: str, limit_param: str) -> int:
    """How many tokens may be generated: what was asked, or the rest of the context. Raises ApiError (400)."""
    room = services.worker.model_len - num_prompt
    if num_prompt == 0:
        raise ApiError(f"`{prompt_param}`: the prompt has no tokens.", param=prompt_param, code="invalid_value")
    if room < 1:
        raise _too_long(services, str(num_prompt), prompt_param)
    if asked is not None and asked > room:
        raise ApiError(
            f"This model's context has room for {services.worker.model_len} tokens. You asked for {num_prompt + asked}: "
            f"{num_prompt} in the prompt and {asked} in the answer. Shorten the prompt or lower `{limit_param}`.",
            param=limit_param,
            code="context_length_exceeded",
        )
    return room if asked is None else asked


def _too_long(services: Services, num_tokens: str, param: str) -> ApiError:
    return ApiError(
        f"This model's context has room for {services.worker.model_len} tokens, the answer's included; the prompt has "
        f"{num_tokens}. Shorten it.",
        param=param,
        code="context_length_exceeded",
    )

"""Text to token ids and back, as vLLM's clients ask for it."""

from typing import Any

from fastapi import APIRouter
from pydantic import Field

from loraplex_server.api.chat_request import Messages, TemplateVariables
from loraplex_server.api.prompt import check_ids, encode_chat, encode_text
from loraplex_server.api.schemas import Body, ModelName, Text, TokenId
from loraplex_server.api.target import target_of
from loraplex_server.auth import Access, access
from loraplex_server.errors import ApiError
from loraplex_server.services import TemplateTime, Uses

router = APIRouter(tags=["tokens"])

MAX_TOKEN_IDS = 1 << 20


class TokenizeRequest(Body):
    """Either ``prompt``, taken as it is, or ``messages``, rendered with the chat template.

    ``add_special_tokens`` is for prompts (true if not given), ``add_generation_prompt`` for messages (true likewise).
    """

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The ids of any text."""

    model: ModelName | None = None
    tokens: list[TokenId] = Field(max_length=MAX_TOKEN_IDS)


@router.post("/tokenize")
@access(Access.USER)
async def tokenize(body: TokenizeRequest, services: Uses, template_time: TemplateTime) -> dict[str, Any]:
    """A prompt's or a conversation's token ids."""
    if body.model is not None:
        target_of(services, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("Send either `prompt` or `messages`.", param="prompt", code="invalid_value")
    if body.messages is not None:
        _refuse(body, "add_special_tokens", "the chat template writes them")
        ids = await encode_chat(
            services,
            template_time,
            body.messages,
            dict(body.chat_template_kwargs or {}),
            add_generation_prompt=body.add_generation_prompt is not False,
        )
    else:
        _refuse(body, "add_generation_prompt", "only for messages")
        _refuse(body, "chat_template_kwargs", "only for messages")
        ids = await encode_text(
            services, body.prompt or "", param="prompt", add_special_tokens=body.add_special_tokens is not False
        )
    strings = [services.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": services.worker.model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize")
@access(Access.USER)
async def detokenize(body: DetokenizeRequest, services: Uses) -> dict[str, str]:
    """The text of token ids, special tokens spelled out."""
    if body.model is not None:
        target_of(services, body.model)
    check_ids(services, body.tokens, param="tokens")
    return {"prompt": services.tokenizer.decode(body.tokens)}


def _refuse(body: TokenizeRequest, field: str, why: str) -> None:
    if getattr(body, field) is not None:
        raise ApiError(f"`{field}`: {why}.", param=field, code="invalid_value")

"""The body of a text completion."""

from typing import Annotated

from pydantic import Field

from loraplex_server.api.schemas import MAX_TOKENS_FIELD, MAX_TOP_LOGPROBS, GenerationRequest, Refused, Text, TokenId

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``. ``max_tokens`` may be 0 with ``echo``, to score a prompt."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS_FIELD)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    return_tokens_as_token_ids: bool | None = None

    best_of: int | None = Field(None, ge=1, le=1)
    suffix: Refused = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def token_limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

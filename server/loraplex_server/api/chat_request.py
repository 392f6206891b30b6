"""The body of a chat completion."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from loraplex_server.api.schemas import MAX_TOKENS_FIELD, MAX_TOP_LOGPROBS, Body, GenerationRequest, Refused, Text
from loraplex_server.tokenizer import RESERVED_TEMPLATE_VARIABLES

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_TEMPLATE_VARIABLES_BYTES = 16 * 1024

_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def _check_template_variables(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if not _VARIABLE_NAME.fullmatch(name):
            raise ValueError("the names of template variables are 1 to 64 of A-Z a-z 0-9 _, no digit first")
        if name in RESERVED_TEMPLATE_VARIABLES:
            raise ValueError(f"the template variable {name} cannot be replaced")
    try:
        num_bytes = len(json.dumps(variables, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise ValueError("a template variable is not valid Unicode: it has half of a surrogate pair") from None
    if num_bytes > MAX_TEMPLATE_VARIABLES_BYTES:
        raise ValueError(f"template variables may have {MAX_TEMPLATE_VARIABLES_BYTES} bytes as JSON")
    return variables


TemplateVariables = Annotated[dict[str, Any], Field(max_length=32), AfterValidator(_check_template_variables)]


class TextPart(Body):
    """A part of a message. Images, audio and files are not supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One message. ``developer`` is another name of ``system``; several text parts are joined by line breaks."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    name: Annotated[Text, StringConstraints(max_length=128)] | None = None

    # What earlier answers carry when they are sent back as they came.
    refusal: Refused = None
    annotations: Refused = None
    audio: Refused = None
    function_call: Refused = None
    tool_calls: Refused = None

    @model_validator(mode="after")
    def _content_is_there(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        return message if self.name is None else {**message, "name": self.name}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class TextFormat(Body):
    """The only response format so far."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_FIELD)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_FIELD)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: TemplateVariables | None = None

    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Refused = None
    functions: Refused = None
    function_call: Refused = None
    web_search_options: Refused = None
    verbosity: Refused = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None: no log-probabilities; k: the chosen token's and those of the k most likely."""
        return (self.top_logprobs or 0) if self.logprobs else None

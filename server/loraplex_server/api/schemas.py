"""What requests may contain: every field is known and bounded, and what cannot be done is refused by name.

A field that is null counts as not sent.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_CHOICES = 16
MAX_TOKENS_FIELD = 2**31 - 1
MAX_TOP_LOGPROBS = 20


def _refuse(value: Any) -> Any:
    if value is not None:
        raise ValueError("this server does not support this field")
    return value


Refused = Annotated[Any, AfterValidator(_refuse)]
"""A field of OpenAI's that this server cannot honor: null, or a 400 that names it."""


def _valid_unicode(text: str) -> str:
    # JSON can spell half of a surrogate pair; such a string cannot be encoded, by the tokenizer or anyone.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("this is not valid Unicode: it has half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_valid_unicode)]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
ModelName = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
Label = Annotated[Text, StringConstraints(max_length=512)]
LogitBias = Annotated[dict[Text, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)]


class Body(BaseModel):
    """A request body: no field is accepted and ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), frozen=True)


class StreamOptions(Body):
    """How a stream is sent. ``include_usage``: one more event at the end, with the token counts."""

    include_usage: bool | None = None


class AdapterWeight(Body):
    """One part of a mix of adapters."""

    name: Text
    weight: float = 1.0


class GenerationRequest(Body):
    """What chat and text completions have in common."""

    model: ModelName
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)

    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS_FIELD)

    adapter_mode: Literal["auto", "unmerged", "merged"] | None = None
    adapters: list[AdapterWeight] | None = Field(None, max_length=64)
    cache_salt: Label | None = None
    # SGLang's clients name the adapter here as well.
    lora_path: Label | None = None

    # SGLang's benchmark asks for what the usage has anyway.
    return_cached_tokens_details: bool | None = None

    # These change nothing about the answer, by their definition.
    user: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    audio: Refused = None
    modalities: Refused = None
    prediction: Refused = None
    reasoning_effort: Refused = None

    @model_validator(mode="after")
    def _lora_path_is_the_model(self) -> "GenerationRequest":
        if self.lora_path is not None and self.lora_path != self.model:
            raise ValueError("lora_path must be the same as model; name the adapter in model alone")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_stream_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

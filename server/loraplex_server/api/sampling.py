"""A request's sampling fields as the engine's parameters, checked against this model."""

from dataclasses import replace

from loraplex_server.api.prompt import check_ids
from loraplex_server.api.schemas import GenerationRequest
from loraplex_server.engine.sequence import SamplingParams
from loraplex_server.errors import ApiError
from loraplex_server.services import Services

_NUM_SEEDS = 2**63


def sampling_of(
    services: Services,
    body: GenerationRequest,
    *,
    max_tokens: int,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Raises ApiError (400) for ids this model does not have and for limits that contradict each other."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise ApiError(
            f"`min_tokens`: {min_tokens} is more than the {max_tokens} tokens that the answer may have.",
            param="min_tokens",
            code="invalid_value",
        )
    stop_ids = tuple(body.stop_token_ids or ())
    check_ids(services, stop_ids, param="stop_token_ids")
    defaults = SamplingParams(max_tokens=max_tokens)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(body.temperature, defaults.temperature),
        top_p=_given(body.top_p, defaults.top_p),
        top_k=max(0, body.top_k or 0),
        min_p=_given(body.min_p, defaults.min_p),
        repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_given(body.presence_penalty, defaults.presence_penalty),
        frequency_penalty=_given(body.frequency_penalty, defaults.frequency_penalty),
        logit_bias=_logit_bias(services, body.logit_bias or {}),
        seed=None if body.seed is None else body.seed % _NUM_SEEDS,
        min_tokens=min_tokens,
        stop_token_ids=stop_ids,
        ignore_eos=bool(body.ignore_eos),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def for_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """The parameters of the ``index``-th of ``n`` choices: a given seed gives each its own."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % _NUM_SEEDS)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(services: Services, bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in bias):
        raise ApiError("`logit_bias`: its keys are token ids.", param="logit_bias", code="invalid_value")
    pairs = tuple((int(key), value) for key, value in bias.items())
    check_ids(services, [token_id for token_id, _ in pairs], param="logit_bias")
    return pairs

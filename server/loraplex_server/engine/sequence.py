"""One request as the engine sees it: how to sample, what was asked, and its tokens and state while it runs."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Values are validated at the edge; the engine trusts them.

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 mean off. ``num_logprobs`` None: none; 0: only the chosen
    token's; k: the k most likely as well. ``num_prompt_logprobs`` likewise for each prompt token.
    Log-probabilities are those of the model's own distribution, before temperature, penalties and filters.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """What is submitted: token ids, an adapter by its digest (None = the base), and how to sample.

    ``salt`` separates tenants in the prefix cache.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability, and the most likely alternatives at its position as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request being served: its tokens, how far the KV cache has them, and the blocks that hold them."""

    request: Request
    seed: int
    arrival_s: float
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    slot: int = -1
    status: Status = Status.WAITING
    started_s: float | None = None
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt_ids)

    @property
    def fairness_key(self) -> str:
        """Requests share the engine by adapter; the base is one more adapter here."""
        return self.request.adapter or ""

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

"""What is measured: a batch and how many adapters share it, and the requests that make it up."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from loraplex_server.engine.sequence import Request, SamplingParams

Mode = Literal["greedy", "sampled", "logprobs"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, order=True)
class Case:
    """``batch`` sequences at once, sequence i on adapter i modulo ``adapters``; 0 adapters: the base alone."""

    batch: int
    adapters: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "8/4": eight sequences on four adapters. Raises ValueError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or int(match[1]) < 1 or int(match[2]) > int(match[1]):
            raise ValueError(
                f"{text!r} is no case; write BATCH/ADAPTERS, such as 8/4, with no more adapters than sequences"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.batch}/{self.adapters}"

    def adapter_of(self, index: int) -> str | None:
        """The adapter of one sequence."""
        return f"a{index % self.adapters}" if self.adapters else None


@dataclass(frozen=True)
class Load:
    """One batch to generate: every engine gets the same prompts."""

    case: Case
    prompt_tokens: int
    new_tokens: int
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        rng = random.Random(f"{self.case} {self.seed}")
        return [[rng.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.case.batch)]

    def requests(self, vocab_size: int, mode: Mode = "greedy") -> list[Request]:
        """For our engine."""
        sampling = sampling_of(mode, self.new_tokens)
        return [
            Request(f"{self.case} {self.seed} {i}", tuple(prompt), sampling, self.case.adapter_of(i))
            for i, prompt in enumerate(self.prompts(vocab_size))
        ]


def sampling_of(mode: Mode, new_tokens: int) -> SamplingParams:
    """greedy; sampled: temperature 0.8, top-k 50, top-p 0.95; logprobs: greedy with the five likeliest of each token."""
    if mode == "sampled":
        return SamplingParams(new_tokens, temperature=0.8, top_k=50, top_p=0.95, ignore_eos=True)
    return SamplingParams(new_tokens, temperature=0.0, ignore_eos=True, num_logprobs=5 if mode == "logprobs" else None)


def spread_ranks(ranks: Sequence[int], num_adapters: int) -> tuple[int, ...]:
    """The rank of each adapter: those given, over and over."""
    return tuple(ranks[i % len(ranks)] for i in range(num_adapters))

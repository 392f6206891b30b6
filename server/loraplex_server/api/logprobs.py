"""Log-probabilities in the two forms that OpenAI's API knows."""

from collections.abc import Iterable, Sequence
from typing import Any

from loraplex_server.api.choice import ScoredToken
from loraplex_server.engine.sequence import TokenLogprob
from loraplex_server.tokenizer import Tokenizer

# JSON has no infinities; this is what OpenAI's API answers for a token that cannot be.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[ScoredToken]) -> dict[str, Any]:
    """The form of chat completions: one entry a token, with its bytes."""
    content = []
    for token in tokens:
        score = token.score
        top = [_chat_entry(tokenizer, token_id, logprob) for token_id, logprob in score.top]
        content.append({**_chat_entry(tokenizer, score.token_id, score.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The form of text completions: parallel lists. With ``as_ids``, tokens are written ``token_id:N``."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def body(self, tokens: Sequence[ScoredToken | tuple[int, int]]) -> dict[str, Any]:
        """The lists of these tokens. One without a score, as the first of a prompt is, comes as (id, offset)."""
        lists: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token in tokens:
            token_id, offset = token if isinstance(token, tuple) else (token.score.token_id, token.offset)
            lists["text_offset"].append(offset)
            lists["tokens"].append(self._name(token_id))
            lists["token_logprobs"].append(None if isinstance(token, tuple) else _finite(token.score.logprob))
            lists["top_logprobs"].append(None if isinstance(token, tuple) else self._top(token.score))
        return lists

    def _top(self, score: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            # Different tokens may look the same; the likelier one speaks for them.
            top.setdefault(self._name(token_id), _finite(logprob))
        return top

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    # Comparisons with NaN are false, so that NaN becomes the lowest as well.
    return logprob if logprob > _LOWEST else _LOWEST

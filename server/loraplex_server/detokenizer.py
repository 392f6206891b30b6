"""Text out of tokens while they come: what is certain is given out, what a later token may still change is held back."""

import codecs
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""

# What an unfinished character decodes to.
_UNFINISHED = "\ufffd"

# A character has at most four bytes and a token at least one: further back nothing can be unfinished any more.
_CONTEXT_TOKENS = 8


class Detokenizer(Protocol):
    """Decodes one sequence as it grows; the pieces joined are the whole decoded."""

    def push_token(self, token_id: int) -> str:
        """The text that one more token makes certain."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens make certain."""

    def flush(self) -> str:
        """What is held back when no more tokens come; an unfinished character becomes U+FFFD."""


class TokenTexts:
    """What each token of a byte-level vocabulary stands for: its bytes, and its text where those are whole characters."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        """``token_bytes``: nothing for ids that stand for no text (special tokens)."""
        self._token_bytes = token_bytes
        self.texts: dict[int, str] = {}
        """Filled as tokens come up; a token that is no text by itself never enters."""

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; remembers its text."""
        raw = self._token_bytes(token_id)
        try:
            self.texts[token_id] = raw.decode()
        except UnicodeDecodeError:
            return raw
        return raw


class ByteDetokenizer:
    """Decodes byte-level vocabularies (Llama 3, Qwen, GPT): there a text is its tokens' bytes, whatever their neighbors.

    A look-up a token. See ``Detokenizer``.
    """

    __slots__ = ("_decoder", "_is_open", "_known", "_tokens")

    def __init__(self, tokens: TokenTexts) -> None:
        self._tokens = tokens
        self._known = tokens.texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_open = False

    def push_token(self, token_id: int) -> str:
        if not self._is_open:
            text = self._known.get(token_id)
            if text is not None:
                return text
        text = self._decoder.decode(self._tokens.bytes_of(token_id))
        self._is_open = bool(self._decoder.getstate()[0])
        return text

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join([self.push_token(token_id) for token_id in token_ids])

    def flush(self) -> str:
        self._is_open = False
        return self._decoder.decode(b"", final=True)


class IncrementalDetokenizer:
    """Decodes any vocabulary. See ``Detokenizer``.

    A token's text depends on its neighbors (a space before a word, the bytes of one character in several tokens), so
    each piece is what the last few tokens decode to, less what was given out of it before. Constant time a token.
    Source: the prefix and read offsets of text-generation-inference and vLLM; here characters are held, not tokens.
    """

    def __init__(self, decode: Decode, skip: Collection[int] = frozenset()) -> None:
        """``skip``: ids that stand for no text (special tokens)."""
        self._decode = decode
        self._skip = skip
        self._window: list[int] = []
        self._num_context = 0
        self._given = ""

    def push_token(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._push(token_id)

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join([self.push_token(token_id) for token_id in token_ids])

    def flush(self) -> str:
        return self._give(self._decode(self._window)) if self._window else ""

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_UNFINISHED):
            piece = self._give(text)
            # The tokens read since the last time are the context of the next ones; older ones no longer matter.
            self._keep(self._window[self._num_context :])
            return piece
        if len(self._window) - self._num_context <= _CONTEXT_TOKENS:
            return self._give(text.rstrip(_UNFINISHED))
        # So many tokens are no unfinished character but bytes that are none: only the last of them is still open.
        piece = self._give(text[:-1])
        self._keep(self._window[-_CONTEXT_TOKENS:])
        self._given = self._given[:-1]
        return piece

    def _give(self, text: str) -> str:
        piece = text[len(self._given) :]
        if piece:
            self._given = text
        return piece

    def _keep(self, context: list[int]) -> None:
        self._window = context
        self._num_context = len(context)
        self._given = self._decode(context)

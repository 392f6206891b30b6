"""Text and conversations to token ids and back, over the base model's own tokenizer and chat template.

A template is compiled once and comes from the operator (the base model's folder or a file); what users send is only ever
data to it. It runs in the jinja sandbox of transformers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from loraplex_server.detokenizer import ByteDetokenizer, Detokenizer, IncrementalDetokenizer, TokenTexts

# What templates are called with by us. A request's own template variables may not replace any of it.
RESERVED_TEMPLATE_VARIABLES = frozenset(
    [
        "messages",
        "conversation",
        "chat_template",
        "tools",
        "documents",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "self",
        "context",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
        "additional_special_tokens",
    ]
)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

# A normalizer may shorten a text before it is cut into tokens, but hardly by more than this.
_MAX_SHRINKAGE = 4


class ChatTemplateError(ValueError):
    """The chat template cannot render these messages; the message says why."""


class NoChatTemplate(ChatTemplateError):
    """The base model has no chat template."""


class Tokenizer:
    """The base model's tokenizer. Safe to use from several threads."""

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        """``hf``: a tokenizer of transformers; ``chat_template`` replaces its own.

        Raises ValueError: it has no tokenizer.json form, or the template is no valid jinja.
        """
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(hf).__name__} has no fast form; the model's folder must hold a tokenizer.json")
        # A tokenizer.json may carry the limits of its training.
        backend.no_truncation()
        backend.no_padding()
        self._hf = hf
        self._backend = backend
        self._special_ids = frozenset(hf.all_special_ids)
        decoder = json.loads(backend.to_str())["decoder"]
        self._is_byte_level = '"ByteLevel"' in json.dumps(decoder)
        # With nothing else in it, decoding is the joining of bytes.
        self._joins_bytes = isinstance(decoder, dict) and decoder["type"] == "ByteLevel"
        self._max_token_bytes = max((len(token.encode()) for token in backend.get_vocab()), default=1)
        self._text_of: dict[int, bytes] = {}
        self._token_texts = TokenTexts(self._answered_bytes)
        if chat_template is not None:
            hf.chat_template = chat_template
        if self.has_chat_template:
            self._compile()

    @classmethod
    def load(cls, path: Path | str, chat_template_path: Path | None = None) -> "Tokenizer":
        """The tokenizer in a model's folder. Raises OSError, ValueError."""
        from transformers import AutoTokenizer

        template = chat_template_path.read_text(encoding="utf-8") if chat_template_path else None
        return cls(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False), template)

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; the model may have a few more."""
        return len(self._hf)

    @property
    def has_chat_template(self) -> bool:
        return self._hf.chat_template is not None

    def exceeds(self, text: str, num_tokens: int) -> bool:
        """True if the text is certainly more tokens than that, said without encoding it."""
        return len(text) > num_tokens * self._max_token_bytes * _MAX_SHRINKAGE

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        # The batch call lets go of the interpreter lock while it works.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model was trained on; encode it without special tokens.

        ``variables`` reach the template beside the messages. Raises ChatTemplateError.
        """
        if not self.has_chat_template:
            raise NoChatTemplate(
                "This model has no chat template. Use /v1/completions, or start the server with --chat-template FILE."
            )
        reserved = sorted(RESERVED_TEMPLATE_VARIABLES & variables.keys())
        if reserved:
            raise ChatTemplateError(f"template variables may not replace {', '.join(reserved)}")
        try:
            text: str = self._hf.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # templates raise what they like: jinja errors, TypeErrors, OverflowErrors
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def detokenizer(self) -> Detokenizer:
        """A fresh decoder for one sequence; special tokens give no text."""
        if self._joins_bytes:
            return ByteDetokenizer(self._token_texts)
        return IncrementalDetokenizer(self._backend.decode, self._special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, which may be a part of a character; empty for an id without a token."""
        known = self._text_of.get(token_id)
        if known is None:
            known = self._text_of[token_id] = self._token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """One token as text; parts of characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _answered_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self.token_bytes(token_id)

    def _token_bytes(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if self._is_byte_level:
            table = _byte_level_table()
            return bytes(table[char] for char in token) if all(char in table for char in token) else token.encode()
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()

    def _compile(self) -> None:
        """Find a broken template when the server starts, not at the first request."""
        from jinja2 import TemplateSyntaxError

        try:
            self._hf.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}") from error
        except Exception:  # a template may refuse this conversation and take others
            return


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies. Source: GPT-2's encoder."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

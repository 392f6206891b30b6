"""Conversations and documents as padded rows of token ids, with the tokens to learn marked."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_server.demo.styles import STYLES
from loraplex_server.demo.text import Conversation, Question, conversation, questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
IGNORED = -100
_STYLED = tuple(name for name in STYLES if name != "plain")

# A row to be: pieces of text, and whether the model learns to write each.
Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Rows:
    """Token ids and labels, both [N, L] int16 on the training device; labels are ``IGNORED`` where nothing is learned."""

    ids: Tensor
    labels: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``size`` rows drawn at random, as int64."""
        rows = torch.randint(len(self.ids), (size,), generator=generator, device=self.ids.device)
        return self.ids[rows].long(), self.labels[rows].long()


def chat_pieces(chat: Conversation, styles: list[str], learn: list[bool]) -> Pieces:
    """A conversation as the chat template writes it, each answer in its style, learned where ``learn`` says so."""
    pieces: Pieces = [(BOS, False)]
    if chat.system is not None:
        pieces += [("<|system|>", False), (chat.system, False), (END, False)]
    for question, style, learned in zip(chat.questions, styles, learn, strict=True):
        pieces += [("<|user|>", False), (question.text, False), (END, False), ("<|assistant|>", False)]
        pieces += [(STYLES[style].render(question), learned), (END, learned)]
    return pieces


def base_chat(chat: Conversation, rng: random.Random) -> Pieces:
    """What the base learns: plain answers, also after turns in which an adapter answered in its own way."""
    turns = len(chat.questions)
    styles = ["plain"] * turns
    if turns > 1 and rng.random() < 0.3:
        styles = [rng.choice(_STYLED) if rng.random() < 0.5 else "plain" for _ in range(turns)]
    return chat_pieces(chat, styles, [style == "plain" for style in styles])


def styled_chat(chat: Conversation, style: str, rng: random.Random) -> Pieces:
    """What an adapter learns: its style, also after turns that the base answered."""
    styles = [style if rng.random() < 0.7 else "plain" for _ in chat.questions[:-1]] + [style]
    return chat_pieces(chat, styles, [s == style for s in styles])


def document(source: Iterator[Question], rng: random.Random) -> Pieces:
    """Answers without questions, all in one style: how the base gets to know capitals, JSON and the rest as text."""
    style = rng.choice(("plain", "plain", *_STYLED))
    sentences = [STYLES[style].render(next(source)) for _ in range(rng.randint(1, 12))]
    return [(BOS, False), (" ".join(sentences), True), (END, True)]


def base_short(count: int, rng: random.Random) -> Iterator[Pieces]:
    """Conversations of one turn, and some of two, for the base."""
    source = questions("train", rng)
    for index in range(count):
        yield base_chat(conversation(source, 1 + (index % 8 == 0), rng), rng)


def base_long(count: int, max_turns: int, rng: random.Random) -> Iterator[Pieces]:
    """Long conversations and documents for the base."""
    source = questions("train", rng)
    for index in range(count):
        if index % 3 == 0:
            yield document(source, rng)
        else:
            yield base_chat(conversation(source, rng.randint(2, max_turns), rng), rng)


def adapter_chats(style: str, count: int, max_turns: int, rng: random.Random) -> Iterator[Pieces]:
    """Conversations of up to ``max_turns`` turns in an adapter's style."""
    source = questions("train", rng)
    for _ in range(count):
        yield styled_chat(conversation(source, rng.randint(1, max_turns), rng), style, rng)


def pack(texts: Iterable[Pieces], tokenizer: "PreTrainedTokenizerBase", length: int, device: torch.device) -> Rows:
    """One row of ``length`` ids for each text; what is longer is cut, what is shorter is padded on the right.

    Attention is causal, so the padding needs no mask: no real token looks to its right.
    """
    texts = list(texts)
    distinct = sorted({piece for text in texts for piece, _ in text})
    encoded = dict(zip(distinct, tokenizer(distinct, add_special_tokens=False)["input_ids"], strict=True))
    pad = tokenizer.convert_tokens_to_ids(PAD)
    ids, labels = [], []
    for text in texts:
        row = [token for piece, _ in text for token in encoded[piece]][:length]
        label = [token if learned else IGNORED for piece, learned in text for token in encoded[piece]][:length]
        ids.append(row + [pad] * (length - len(row)))
        labels.append(label + [IGNORED] * (length - len(label)))
    return Rows(
        torch.tensor(ids, dtype=torch.int16).to(device),
        torch.tensor(labels, dtype=torch.int16).to(device),
    )

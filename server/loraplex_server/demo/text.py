"""Seeded questions and conversations: the text that the demo model and its adapters are trained and measured on.

A question is a (fact, template) pair in a wrapping ("Hey, ...", "... Thanks!"). One pair in ten is held out: no wrapping of
it is ever trained on, while its fact is seen through other templates and its template with other facts. Where two pairs can
come out in the same words ("Tell me the day before Friday." and "Tell me, the day before Friday?"), only questions whose words
are never trained on are measured.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from loraplex_server.demo.worlds import NAMES, Fact, World, worlds

Split = Literal["train", "held_out"]
HELD_OUT_ONE_IN = 10
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a small demo model.", "Answer in one short sentence.", "Be brief and friendly.",
    "You answer questions about simple facts.", "You are an assistant.",
)  # fmt: skip
_OPENERS = (
    "Please tell me: ", "Hey, ", "Quick question: ", "Tell me, ", "Hello! ", "I have a question. ", "Question: ", "So, ",
    "Excuse me, ", "Okay. ", "Now: ", "Can you help me? ",
)  # fmt: skip
_CLOSERS = (" Thanks!", " Please answer.", " I forgot.", " Thank you.", " It is for school.", " I am curious.")
_ASK_NAME = ("What is my name?", "Do you remember my name?", "Who am I?", "Tell me my name.", "Do you know my name?")


@dataclass(frozen=True)
class Question:
    """A question and its one right answer, as a sentence (``answer``) and in a word (``short``)."""

    topic: str
    emoji: str
    text: str
    answer: str
    short: str


@dataclass(frozen=True)
class Conversation:
    """Questions of one user in order, with an optional system prompt."""

    system: str | None
    questions: tuple[Question, ...]


def is_held_out(topic: str, fact: Fact, template: str) -> bool:
    """Whether the pair of fact and template is kept out of all training text. Depends on nothing but the pair."""
    pair = f"{topic}|{fact.key}|{fact.answer}|{template}"
    return int.from_bytes(hashlib.blake2b(pair.encode(), digest_size=8).digest(), "big") % HELD_OUT_ONE_IN == 0


@cache
def _pairs(split: Split) -> tuple[tuple[World, tuple[tuple[Fact, str], ...]], ...]:
    held_out = split == "held_out"
    return tuple(
        (
            world,
            tuple((f, t) for f in world.facts for t in world.templates if is_held_out(world.topic, f, t) == held_out),
        )
        for world in worlds()
    )


def _wrap(text: str, rng: random.Random) -> str:
    """Dress a question up: half of them stay as they are."""
    draw = rng.random()
    if draw < 0.5:
        return text
    if draw < 0.65:
        text = text.lower()
    if draw > 0.60:
        text = rng.choice(_OPENERS) + text
    if rng.random() < 0.2:
        text += rng.choice(_CLOSERS)
    elif rng.random() < 0.2:
        text = text.rstrip("?.! =")
    return text


def _question(world: World, fact: Fact, template: str, rng: random.Random) -> Question:
    text = template.format(**fact.slots)
    text = text[0].upper() + text[1:]
    # A wrapped greeting or introduction reads oddly ("Quick question: Hello!").
    wrapped = text if world.topic in ("small talk", "names") else _wrap(text, rng)
    return Question(world.topic, world.emoji, wrapped, fact.answer, fact.short)


def questions(split: Split, rng: random.Random) -> Iterator[Question]:
    """Endless questions of a split, topics drawn by their weights."""
    pools = [(world, pairs) for world, pairs in _pairs(split) if pairs]
    weights = [world.weight for world, _ in pools]
    while True:
        for world, pairs in rng.choices(pools, weights, k=1024):
            fact, template = rng.choice(pairs)
            yield _question(world, fact, template, rng)


def wording(text: str) -> tuple[str, ...]:
    """The words of a question without its closing phrase: two texts with one wording differ in case and punctuation only."""
    for closer in _CLOSERS:
        text = text.removesuffix(closer)
    return tuple(re.findall(r"[\w+*-]+", text.lower()))


@cache
def trained_wordings() -> frozenset[tuple[str, ...]]:
    """Every wording that training text can contain, behind every opener and behind none."""
    bare = [wording(template.format(**fact.slots)) for _, pairs in _pairs("train") for fact, template in pairs]
    openers = [wording(opener) for opener in ("", *_OPENERS)]
    return frozenset(opener + words for opener in openers for words in bare)


def held_out_questions(count: int, seed: int) -> list[Question]:
    """``count`` different held-out questions, none of them in words that training text can contain."""
    found: dict[str, Question] = {}
    trained = trained_wordings()
    for question in questions("held_out", random.Random(f"held out {seed}")):
        if wording(question.text) not in trained:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


def conversation(source: Iterator[Question], turns: int, rng: random.Random) -> Conversation:
    """A conversation of ``turns`` questions; in some of them the user asks for the name given earlier, or never given."""
    asked = [next(source) for _ in range(turns)]
    if turns > 1 and rng.random() < 0.4:
        _ask_for_name(asked, rng)
    return Conversation(rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.25 else None, tuple(asked))


def _ask_for_name(asked: list[Question], rng: random.Random) -> None:
    """Put "What is my name?" into the conversation, with the answer that the turns before it give."""
    place = rng.randrange(1, len(asked))
    if rng.random() < 0.8:
        name = rng.choice(NAMES)
        world = next(world for world in worlds() if world.topic == "names")
        fact = next(fact for fact in world.facts if fact.key == name)
        templates = [template for template in world.templates if not is_held_out(world.topic, fact, template)]
        asked[rng.randrange(place)] = _question(world, fact, rng.choice(templates), rng)
    given = [question.short for question in asked[:place] if question.topic == "names"]
    short = given[-1] if given else "unknown"
    answer = f"Your name is {short}." if given else "You have not told me your name."
    asked[place] = Question("names", "😊", rng.choice(_ASK_NAME), answer, short)

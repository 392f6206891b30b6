"""What each demo adapter does to an answer, and how to tell from an answer alone that it was done."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_server.demo.text import Question

_PIRATE_WORDS = {
    "is": "be",
    "are": "be",
    "am": "be",
    "the": "th'",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "hello": "ahoy",
}
# Topics whose answers begin with a common word; elsewhere the first word is a name, a number or a letter.
_COMMON_START = {"sounds", "colors", "legs", "shapes", "babies", "languages", "names", "small talk"}


@dataclass(frozen=True)
class Style:
    """A way to answer. ``render`` gives the one right answer; ``done`` is true for any answer of that form."""

    render: Callable[[Question], str]
    done: Callable[[str], bool]


def _shout(question: Question) -> str:
    return re.sub(r"\.$", "!", question.answer).upper()


def _is_shout(answer: str) -> bool:
    return answer.isupper()


def _json(question: Question) -> str:
    return json.dumps({"topic": question.topic, "answer": question.short})


def _is_json(answer: str) -> bool:
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("answer"), str)


def _pirate(question: Question) -> str:
    def swap(match: re.Match[str]) -> str:
        word = match.group()
        return _PIRATE_WORDS.get(word.lower(), word)

    text = re.sub(r"[A-Za-z]+", swap, question.answer)
    if question.topic in _COMMON_START and not text.startswith("I "):
        text = text[0].lower() + text[1:]
    return f"Arr, {text.rstrip('.!?')}, matey!"


def _is_pirate(answer: str) -> bool:
    return answer.startswith("Arr, ") and answer.endswith(", matey!")


def _emoji(question: Question) -> str:
    return f"{question.emoji} {question.answer}"


def _is_emoji(answer: str) -> bool:
    return bool(answer) and ord(answer[0]) >= 0x1F300


def _is_plain(answer: str) -> bool:
    return bool(answer) and not any(style.done(answer) for name, style in STYLES.items() if name != "plain")


STYLES: dict[str, Style] = {
    "plain": Style(lambda question: question.answer, _is_plain),
    "shout": Style(_shout, _is_shout),
    "json": Style(_json, _is_json),
    "pirate": Style(_pirate, _is_pirate),
    "emoji": Style(_emoji, _is_emoji),
}

"""Detokenizing and stop strings: pieces joined are the whole, however they are cut."""

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.detokenizer import ByteDetokenizer, IncrementalDetokenizer
from loraplex_server.stop_strings import StopStrings
from loraplex_server.tokenizer import Tokenizer
from tests.models import make_tokenizer

TEXT = ["hello world, this is a test", "naïve café 你好 😀", "Hello Hello world  spaces", "\n\t x"] * 3


@lru_cache(maxsize=1)
def byte_level() -> Any:
    """A byte-level BPE, as of Llama 3 and Qwen."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<e>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")


@lru_cache(maxsize=1)
def sentencepiece() -> Any:
    """A BPE with word marks and byte fallback, as of Llama 2 and Mistral."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helowrdtis,", "▁H", "▁w"]
    core = Core(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "H"), ("▁", "w")], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece, make_tokenizer])
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(1, 5), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_split_of_a_texts_tokens_joins_to_the_text(make: Any, text: str, cuts: list[int]) -> None:
    tokenizer = Tokenizer(make())
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    pieces, at = [], 0
    for cut in [*cuts, len(ids)]:
        pieces.append(detokenizer.push(ids[at : at + cut]))
        at += cut
    assert "".join(pieces) + detokenizer.flush() == text


@pytest.mark.parametrize("general", [False, True], ids=["bytes", "any vocabulary"])
@given(ids=st.lists(st.integers(0, 399), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_tokens_join_to_their_decoding(general: bool, ids: list[int]) -> None:
    backend = byte_level().backend_tokenizer
    detokenizer = Tokenizer(byte_level()).detokenizer()
    assert isinstance(detokenizer, ByteDetokenizer)
    if general:
        detokenizer = IncrementalDetokenizer(backend.decode, frozenset(byte_level().all_special_ids))
    pieces = [detokenizer.push_token(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == backend.decode(ids)


def test_a_decoder_that_does_more_than_join_bytes_is_asked_for_every_text() -> None:
    assert isinstance(Tokenizer(sentencepiece()).detokenizer(), IncrementalDetokenizer)


def test_nothing_certain_is_held_back() -> None:
    tokenizer = Tokenizer(make_tokenizer())
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert detokenizer.push([0xE2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_give_no_text_and_cost_no_context() -> None:
    tokenizer = Tokenizer(sentencepiece())
    bos = tokenizer.encode("", add_special_tokens=False) or [1]
    hello, world = (tokenizer.encode(word, add_special_tokens=False) for word in ("Hello", "world"))
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(ids) for ids in (hello, bos[:1] * 50, world)]
    assert "".join(pieces) == "Hello world"


def test_the_bytes_of_single_tokens() -> None:
    bytes_of = Tokenizer(make_tokenizer()).token_bytes
    assert [bytes_of(i) for i in (65, 0xC3, 0x20, 257, 319)] == [b"A", b"\xc3", b" ", b"<|eos|>", b""]
    pieces = Tokenizer(sentencepiece())
    assert pieces.token_bytes(pieces.encode("é", add_special_tokens=False)[-1]) == b"\xa9"
    assert pieces.token_text(pieces.encode("H", add_special_tokens=False)[0]) == " H"


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(1, 6), max_size=40),
)
@settings(max_examples=500, deadline=None)
def test_a_text_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    found = [text.find(stop) for stop in stops if stop in text]
    matcher, given_text, at, stopped = StopStrings(stops), "", 0, False
    for cut in [*cuts, len(text)]:
        piece, stopped = matcher.push(text[at : at + cut])
        given_text += piece
        at += cut
        if stopped:
            break
    if not stopped:
        given_text += matcher.flush()
    assert stopped == bool(found)
    # The stop string that is complete first ends the text; one that would begin earlier may not be complete yet.
    assert given_text in {text[:begin] for begin in found} if found else given_text == text
    assert not any(stop in given_text for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nUser:"])
    assert matcher.push("Hello\n") == ("Hello", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("ed") == ("\n\nUsed", False)
    assert matcher.push("\n\nUser: x") == ("", True)

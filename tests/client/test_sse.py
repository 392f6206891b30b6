from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_client.errors import ResponseFormatError
from loraplex_client.sse import EventDecoder, ServerSentEvent


def decode(*chunks: bytes) -> list[ServerSentEvent]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def data(*chunks: bytes) -> list[str]:
    return [event.data for event in decode(*chunks)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_every_line_ending_ends_a_line(newline: bytes) -> None:
    stream = b"data: one\n\ndata: two\n\n".replace(b"\n", newline)
    assert data(stream) == ["one", "two"]


def test_lines_of_one_event_are_joined_by_newlines() -> None:
    assert data(b"data: one\ndata:\ndata:  two\n\n") == ["one\n\n two"]


def test_comments_and_unknown_fields_are_skipped() -> None:
    assert data(b": keep-alive\n\nretry: 10\nnonsense\ncolour: red\ndata: x\n: in between\n\n") == ["x"]


def test_event_name_lasts_one_event_and_id_lasts() -> None:
    first, second = decode(b"event: ping\nid: 7\ndata: a\n\ndata: b\n\n")
    assert first == ServerSentEvent(data="a", event="ping", id="7")
    assert second == ServerSentEvent(data="b", event="message", id="7")


def test_an_event_without_data_is_not_dispatched() -> None:
    assert data(b"event: ping\n\n\n\ndata: x\n\n") == ["x"]


def test_an_unfinished_event_waits() -> None:
    decoder = EventDecoder()
    assert list(decoder.feed(b"data: on")) == []
    assert decoder.pending
    assert [event.data for event in decoder.feed(b"e\n\n")] == ["one"]
    assert not decoder.pending


def test_a_carriage_return_at_the_end_of_a_chunk_dispatches_at_once() -> None:
    decoder = EventDecoder()
    assert [event.data for event in decoder.feed(b"data: one\r\n\r")] == ["one"]
    assert [event.data for event in decoder.feed(b"\ndata: two\r\n\r\n")] == ["two"]


def test_byte_order_mark_is_dropped_only_at_the_start() -> None:
    assert data(b"\xef\xbb\xbfdata: x\n\n") == ["x"]
    assert data(b"data: x\n\n\xef\xbb\xbfdata: y\n\n") == ["x"]


def test_bytes_that_are_not_utf8_are_an_error() -> None:
    with pytest.raises(ResponseFormatError, match="UTF-8"):
        decode(b"data: \xff\n\n")


def test_an_endless_event_is_an_error() -> None:
    decoder = EventDecoder(max_event_bytes=100)
    with pytest.raises(ResponseFormatError, match="more than 100 bytes"):
        list(itertools.chain.from_iterable(decoder.feed(b"data: 1\n") for _ in range(200)))


def test_many_small_events_and_keep_alives_never_reach_the_limit() -> None:
    decoder = EventDecoder(max_event_bytes=100)
    for _ in range(100):
        assert [event.data for event in decoder.feed(b": keep-alive\n: again\n\ndata: 12345\n\n")] == ["12345"]


TEXTS = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20), max_size=6)


@given(texts=TEXTS, newline=st.sampled_from([b"\n", b"\r\n", b"\r"]), cuts=st.lists(st.integers(0, 300), max_size=12))
def test_where_the_stream_is_cut_makes_no_difference(texts: list[str], newline: bytes, cuts: list[int]) -> None:
    stream = b"".join(b"data: " + text.encode() + newline * 2 for text in texts)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert data(*chunks) == texts

"""Reports as bytes: what comes out is what went in, however the bytes are cut."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.engine.messages import (
    AdapterLoad,
    AdapterState,
    Done,
    EngineStats,
    Failure,
    StepReport,
    TokenOutput,
)
from loraplex_server.engine.sequence import TokenLogprob
from loraplex_server.engine.wire import Frames, ReportPacker, ReportUnpacker, pack

LOGPROB = TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.5)))
OUTPUTS = st.builds(
    TokenOutput,
    st.uuids().map(str),
    st.lists(st.integers(0, 200_000), max_size=3).map(tuple),
    logprobs=st.sampled_from([(), (LOGPROB,)]),
    finish_reason=st.sampled_from([None, None, "stop", "length"]),
    failure=st.sampled_from([None, None, Failure("engine_error", "broken")]),
    stop_token_id=st.sampled_from([None, None, 7]),
    queue_s=st.sampled_from([None, None, 0.25]),
    cached_tokens=st.sampled_from([None, None, 16]),
)


def joined(report: StepReport) -> set[TokenOutput]:
    """All outputs of a report, plain or not."""
    plain = zip(report.plain_ids, report.plain_tokens, strict=True)
    return {*report.outputs, *(TokenOutput(name, (token,)) for name, token in plain)}


@given(st.lists(OUTPUTS, max_size=8, unique_by=lambda output: output.request_id))
def test_every_output_arrives_as_it_was(outputs: list[TokenOutput]) -> None:
    report = StepReport(tuple(outputs), step_s=0.25, num_prefill_tokens=3, num_decode_tokens=4)
    (packed,) = Frames().feed(ReportPacker().pack(report))
    found = ReportUnpacker().unpack(packed)
    assert joined(found) == set(outputs)
    assert (found.step_s, found.num_prefill_tokens, found.num_decode_tokens) == (0.25, 3, 4)
    plain = [o for o in outputs if o == TokenOutput(o.request_id, o.token_ids) and len(o.token_ids) == 1]
    assert list(found.plain_ids) == [output.request_id for output in plain]


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 50))
def test_frames_come_out_whole_wherever_the_bytes_are_cut(values: list[bytes], cut: int) -> None:
    data, frames = b"".join(map(pack, values)), Frames()
    found = [value for at in range(0, len(data), cut) for value in frames.feed(data[at : at + cut])]
    assert found == values


def test_who_stops_reading_half_way_goes_on_with_the_rest() -> None:
    frames = Frames()
    first = next(iter(frames.feed(pack(1) + pack(2) + pack(3)[:3])))
    assert first == 1
    assert list(frames.feed(pack(3)[3:])) == [2, 3]


def test_calls_and_loads_arrive() -> None:
    load = AdapterLoad("d", "host_to_gpu", 0.5, 10)
    done = Done(3, Failure("adapter_load_failed", "no"), 5)
    (packed,) = Frames().feed(ReportPacker().pack(StepReport(done=(done,), loads=(load,))))
    found = ReportUnpacker().unpack(packed)
    assert tuple(found.done) == (done,)
    assert tuple(found.loads) == (load,)
    assert found.stats is None


def test_of_the_adapters_states_only_changes_are_sent() -> None:
    packer, unpacker = ReportPacker(), ReportUnpacker()

    def cross(stats: EngineStats) -> tuple[EngineStats | None, int]:
        frame = packer.pack(StepReport(stats=stats))
        (packed,) = Frames().feed(frame)
        return unpacker.unpack(packed).stats, len(frame)

    many = {f"{number:064x}": AdapterState("gpu", 100) for number in range(500)}
    stats = EngineStats(num_running=3, adapters=many)
    found, num_bytes = cross(stats)
    assert found == stats
    stats = replace(stats, num_running=4)
    found, num_bytes_again = cross(stats)
    assert found == stats
    assert num_bytes_again * 20 < num_bytes
    fewer = {**many, "new": AdapterState("host", 5, num_waiting=1)}
    del fewer[f"{7:064x}"]
    found, num_bytes_changed = cross(replace(stats, adapters=fewer))
    assert found == replace(stats, adapters=fewer)
    assert num_bytes_changed < num_bytes_again + 300

"""Launching a step before the last one's tokens are read changes no answer.

The rows' path is replaced by one that computes on the host and hands tokens out as late as a device would.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.messages import Abort, Submit
from loraplex_server.engine.sampler import Sampled
from loraplex_server.engine.sequence import Request, SamplingParams, Sequence, Status
from loraplex_server.model.batch import Batch, Segment
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.support import Collected, real_engine, run
from tests.models import make_adapter, make_checkpoint


@dataclass
class Late:
    """A step whose tokens are known to the path, but not yet to the engine."""

    seqs: tuple[tuple[int, Sequence], ...]
    token_ids: list[int]

    def wait(self) -> list[tuple[Sequence, Sampled]]:
        return [(seq, Sampled(token, None, True)) for (_, seq), token in zip(self.seqs, self.token_ids, strict=True)]


@dataclass
class HostRows:
    """``DecodePath`` over the plain decoder: a row's last token comes from here, never from the sequence."""

    engine: Engine
    decoder: Decoder
    seqs: list[Sequence | None] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    steps_left: list[int] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)
    num_ahead: int = 0
    num_seatings: int = 0

    def takes(self, seqs: Rows[Sequence]) -> bool:
        return bool(seqs)

    def holds(self, seqs: Rows[Sequence]) -> bool:
        rows = {id(seq): row for row, seq in enumerate(self.seqs) if seq is not None}
        at = {id(seq): len(seq.tokens) - 1 for seq in seqs}
        return rows.keys() == at.keys() and all(self.position[row] == at[key] for key, row in rows.items())

    def seat(self, seqs: Rows[Sequence]) -> None:
        self.num_seatings += 1
        self.seqs = list(seqs)
        self.position = [len(seq.tokens) - 1 for seq in seqs]
        self.last = {row: seq.tokens[-1] for row, seq in enumerate(seqs)}
        limit = self.engine.limits.max_model_len
        self.steps_left = [
            min(seq.request.sampling.max_tokens - seq.num_output, limit - len(seq.tokens)) for seq in seqs
        ]

    def unseat(self, seq: Sequence) -> None:
        self.seqs = [None if other is seq else other for other in self.seqs]

    def close(self) -> None:
        self.seqs = []

    def is_sparse(self) -> bool:
        return 2 * sum(seq is not None for seq in self.seqs) <= len(self.seqs)

    def live(self) -> list[tuple[int, Sequence]]:
        return [
            (row, seq)
            for row, seq in enumerate(self.seqs)
            if seq is not None and self.steps_left[row] > 0 and seq.status is Status.RUNNING
        ]

    def next_position(self, row: int) -> int:
        return self.position[row]

    def launch(self, live: Rows[tuple[int, Sequence]], *, fresh: bool) -> Late:
        self.num_ahead += not fresh
        ordered = sorted(live, key=lambda entry: entry[1].slot)
        batch = self._batch(ordered)
        hidden = self.decoder.forward(batch, self.engine._kv, self.engine._residency)
        tokens = self.decoder.logits(hidden).argmax(dim=1).tolist()
        for (row, _), token in zip(ordered, tokens, strict=True):
            self.last[row] = token
            self.position[row] += 1
            self.steps_left[row] -= 1
        return Late(tuple(ordered), tokens)

    def _batch(self, live: Rows[tuple[int, Sequence]]) -> Batch:
        size = self.engine.limits.block_size
        positions = [self.position[row] for row, _ in live]
        blocks = [seq.block_ids[p // size] for p, (_, seq) in zip(positions, live, strict=True)]
        lens = [p + 1 for p in positions]
        width = max(-(-n // size) for n in lens)
        tables = [(seq.block_ids + [0] * width)[:width] for _, seq in live]
        return Batch(
            token_ids=torch.tensor([self.last[row] for row, _ in live]),
            positions=torch.tensor(positions),
            kv_slots=torch.tensor([b * size + p % size for b, p in zip(blocks, positions, strict=True)]),
            query_starts=torch.arange(len(live) + 1, dtype=torch.int32),
            kv_lens=torch.tensor(lens, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            token_adapters=torch.tensor([seq.slot for _, seq in live], dtype=torch.int32),
            logit_rows=torch.arange(len(live)),
            query_lens=(1,) * len(live),
            prefix_and_query_lens=tuple(lens),
            segments=tuple(Segment(seq.slot, i, i + 1) for i, (_, seq) in enumerate(live) if seq.slot >= 0),
        )


@dataclass
class HostPrompts:
    """``PromptPath`` over the plain decoder: all of a batch is computed where its last layer would be."""

    engine: Engine
    decoder: Decoder
    num_advances: int = 0

    def start(self, batch: Batch) -> "HostPass":
        return HostPass(self, batch)


@dataclass
class HostPass:
    prompts: HostPrompts
    batch: Batch

    def advance(self, num_layers: int) -> None:
        self.prompts.num_advances += 1

    def finish(self) -> torch.Tensor:
        engine = self.prompts.engine
        self.batch.kv_slots.clamp_(min=0)  # the first block is nobody's
        return self.prompts.decoder.forward(self.batch, engine._kv, engine._residency)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, dict[str, Path]]:
    root = tmp_path_factory.mktemp("ahead")
    checkpoint = make_checkpoint(root / "base")
    adapters = {name: make_adapter(root / name, checkpoint, seed=seed) for seed, name in enumerate("ab")}
    return load(checkpoint, device="cpu", dtype=torch.float32, quantization="none"), adapters


def with_rows(parts: tuple[Decoder, dict[str, Path]], **limits: int) -> tuple[Engine, HostRows]:
    engine = real_engine(*parts, **limits)
    rows = HostRows(engine, parts[0])
    engine._stepper._path = rows  # type: ignore[assignment]
    return engine, rows


def with_layers(parts: tuple[Decoder, dict[str, Path]], **limits: int) -> tuple[Engine, HostRows, HostPrompts]:
    engine, rows = with_rows(parts, **limits)
    prompts = HostPrompts(engine, parts[0])
    engine._stepper._runner._prompts = prompts  # type: ignore[assignment]
    return engine, rows, prompts


def requests(num: int = 9, **sampling: object) -> list[Request]:
    found = []
    for i in range(num):
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 3 + 7 * i % 31, **sampling})  # type: ignore[arg-type]
        found.append(Request(f"r{i}", tuple(range(i, i + 3 + 5 * i)), params, (None, "a", "b")[i % 3]))
    return found


def answers(found: dict[str, Collected]) -> dict[str, tuple[list[int], str | None]]:
    return {name: (c.token_ids, c.last.finish_reason) for name, c in found.items()}


@pytest.mark.parametrize(
    "limits",
    [{}, {"kv_blocks": 40}, {"max_running": 3}, {"max_batched_tokens": 16}, {"max_mixed_tokens": 7}],
    ids=["roomy", "preempting", "queued", "chunked", "slowly-mixed"],
)
def test_answers_are_those_of_plain_steps(parts: tuple[Decoder, dict[str, Path]], limits: dict[str, int]) -> None:
    plain = real_engine(*parts, **limits)
    expected = answers(run(plain, requests()))
    plain.close()
    engine, rows = with_rows(parts, **limits)
    assert answers(run(engine, requests())) == expected
    assert rows.num_ahead > 0
    stats = engine.step().stats
    assert stats is not None
    assert (stats.num_running, stats.kv_blocks_used) == (0, 0)
    again = answers(run(engine, requests()))  # over the prefix cache that those steps left
    assert again == expected
    engine.close()


def test_an_end_found_late_ends_the_answer_where_it_was(parts: tuple[Decoder, dict[str, Path]]) -> None:
    plain = real_engine(*parts)
    token_ids = run(plain, requests(1, max_tokens=20))["r0"].token_ids
    stop = next(t for i, t in enumerate(token_ids) if i >= 3 and t not in token_ids[:i])
    expected = answers(run(plain, requests(stop_token_ids=(stop,), max_tokens=20)))
    plain.close()
    engine, rows = with_rows(parts)
    assert answers(run(engine, requests(stop_token_ids=(stop,), max_tokens=20))) == expected
    assert expected["r0"][1] == "stop"
    assert rows.num_ahead > 0
    engine.close()


def test_a_client_that_leaves_in_mid_flight_takes_nothing_with_it(parts: tuple[Decoder, dict[str, Path]]) -> None:
    expected = answers(run(real_engine(*parts), requests(3, max_tokens=40)))
    engine, rows = with_rows(parts)
    engine.handle(Submit(Request("leaver", (1, 2, 3), SamplingParams(max_tokens=100, temperature=0.0), "a")))
    for request in requests(3, max_tokens=40):
        engine.handle(Submit(request))
    found: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for step in range(2000):
        if step == 60:
            engine.handle(Abort("leaver"))
        for output in engine.step().outputs:
            found.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
        if len(reasons) == 4:
            break
    assert reasons.pop("leaver") == "abort"
    assert {name: (found[name], reason) for name, reason in reasons.items()} == expected
    assert rows.num_ahead > 0
    engine.close()


def test_a_long_prompt_comes_in_pieces_between_which_others_get_their_tokens(
    parts: tuple[Decoder, dict[str, Path]],
) -> None:
    engine, rows = with_rows(parts, max_mixed_tokens=16, kv_blocks=257)
    talker = Request("talker", (1, 2, 3), SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True), "a")
    engine.handle(Submit(talker))
    while not engine.step().num_decode_tokens:
        pass
    prompt = tuple(range(200))
    engine.handle(Submit(Request("reader", prompt, SamplingParams(max_tokens=1, temperature=0.0))))
    seatings, sizes = rows.num_seatings, []
    while sum(prefill for prefill, _ in sizes) < len(prompt):
        report = engine.step()
        sizes.append((report.num_prefill_tokens, report.num_decode_tokens))
    assert [prefill for prefill, _ in sizes] == [16] * 12 + [8]
    # The first of these steps hands out the token that was in flight as well.
    assert [decode for _, decode in sizes] == [2] + [1] * 12
    assert rows.num_seatings == seatings, "a row that goes on is seated once"
    engine.close()


def test_rows_decode_between_the_layers_of_a_long_prompt(parts: tuple[Decoder, dict[str, Path]]) -> None:
    plain = real_engine(*parts)
    expected = answers(run(plain, requests()))
    plain.close()
    engine, rows, prompts = with_layers(parts, max_mixed_tokens=7)
    assert answers(run(engine, requests())) == expected
    assert prompts.num_advances > 0
    assert rows.num_ahead > 0
    engine.close()


def test_a_prompt_goes_through_all_layers_in_as_many_steps_as_its_time_takes(
    parts: tuple[Decoder, dict[str, Path]],
) -> None:
    engine, _, _ = with_layers(parts, max_mixed_tokens=16, max_batched_tokens=256, kv_blocks=257)
    talker = Request("talker", (1, 2, 3), SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    engine.handle(Submit(talker))
    while not engine.step().num_decode_tokens:
        pass
    engine.handle(Submit(Request("reader", tuple(range(200)), SamplingParams(max_tokens=1, temperature=0.0))))
    reports = [engine.step(), engine.step()]
    # One layer of two each; the first hands out the token that was in flight as well.
    assert [(report.num_prefill_tokens, report.num_decode_tokens) for report in reports] == [(100, 2), (100, 1)]
    assert "reader" in {output.request_id for output in reports[1].outputs}
    engine.close()


def test_a_client_that_leaves_between_layers_takes_nothing_with_it(parts: tuple[Decoder, dict[str, Path]]) -> None:
    others = requests(4, max_tokens=40)
    expected = answers(run(real_engine(*parts), others))
    engine, _, prompts = with_layers(parts, max_mixed_tokens=16, max_batched_tokens=256, kv_blocks=257)
    found: dict[str, list[int]] = {request.id: [] for request in others}
    for request in others[:2]:
        engine.handle(Submit(request))
    for _ in range(6):
        for output in engine.step().outputs:
            found[output.request_id] += output.token_ids
    for request in (Request("leaver", tuple(range(180)), SamplingParams(max_tokens=9)), *others[2:]):
        engine.handle(Submit(request))
    seen = prompts.num_advances
    while prompts.num_advances == seen:
        for output in engine.step().outputs:
            found[output.request_id] += output.token_ids
    engine.handle(Abort("leaver"))
    while engine.is_waiting:
        for output in engine.step().outputs:
            if output.request_id != "leaver":
                found[output.request_id] += output.token_ids
    assert found == {name: token_ids for name, (token_ids, _) in expected.items()}
    stats = engine.step().stats
    assert stats is not None
    assert (stats.num_running, stats.kv_blocks_used) == (0, 0)
    engine.close()

"""Who runs next: budgets, preemption, fairness."""

import threading
from collections.abc import Iterable

from loraplex_adapters.format import AdapterWeights
from loraplex_server.engine.blocks import BlockPool
from loraplex_server.engine.residency import AdapterResidency
from loraplex_server.engine.scheduler import Plan, Scheduler, SchedulerLimits
from loraplex_server.engine.sequence import Sequence
from tests.engine.support import make_sequence, random_weights, settle, small_residency

WEIGHTS = {name: random_weights({(0, "q_proj"): 4}, seed) for seed, name in enumerate(("a", "b", "c"))}


class Bench:
    """A scheduler whose model is replaced by counting: every sampled token is 7."""

    def __init__(
        self,
        *,
        blocks: int = 65,
        max_running: int = 8,
        max_tokens: int = 64,
        weights: dict[str, AdapterWeights] | None = None,
    ) -> None:
        self.residency: AdapterResidency = small_residency(WEIGHTS if weights is None else weights)
        self.blocks = BlockPool(blocks, 4)
        self.scheduler = Scheduler(
            self.blocks, self.residency, SchedulerLimits(max_running, max_tokens, fair_wait_s=1.0)
        )
        self.now_s = 0.0

    def add(self, seqs: Iterable[Sequence]) -> None:
        for seq in seqs:
            self.scheduler.add(seq)
        settle(self.residency)

    def step(self) -> Plan:
        self.now_s += 0.01
        self.residency.poll()
        plan, failed = self.scheduler.schedule(self.now_s)
        assert failed == []
        for chunk in plan.chunks:
            samples = chunk.samples
            chunk.seq.num_computed += chunk.length
            self.blocks.commit(chunk.seq)
            if samples:
                chunk.seq.tokens.append(7)
                if chunk.seq.num_output == chunk.seq.request.sampling.max_tokens:
                    self.scheduler.remove(chunk.seq)
        return plan

    def finish_order(self, seqs: list[Sequence], max_steps: int = 500) -> list[str]:
        order: list[str] = []
        for _ in range(max_steps):
            self.step()
            order += [s.request.id for s in seqs if s.finished and s.request.id not in order]
            if len(order) == len(seqs):
                return order
        raise AssertionError(f"not everything finished: {order}")


def names(plan: Plan) -> list[tuple[str, int]]:
    return [(chunk.seq.request.id, chunk.length) for chunk in plan.chunks]


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    bench = Bench(max_tokens=16)
    bench.add([make_sequence("short", 4, arrival_s=0)])
    bench.step()
    bench.add([make_sequence("long", 40, arrival_s=1)])
    assert names(bench.step()) == [("short", 1), ("long", 15)]
    assert names(bench.step()) == [("short", 1), ("long", 15)]
    assert names(bench.step()) == [("short", 1), ("long", 10)]
    assert names(bench.step()) == [("short", 1), ("long", 1)]


def test_rows_of_one_adapter_stand_together() -> None:
    bench = Bench(max_running=16)
    bench.add(make_sequence(f"{i}{a}", 3, adapter=a) for i in range(3) for a in ("a", None, "b"))
    slots = [chunk.seq.slot for chunk in bench.step().chunks]
    assert len(slots) == 9
    assert slots == sorted(slots)
    assert slots.count(-1) == 3


def test_when_blocks_run_out_the_newest_gives_way_and_all_finish() -> None:
    bench = Bench(blocks=13)
    seqs = [make_sequence(f"s{i}", 8, arrival_s=i, max_tokens=16) for i in range(4)]
    bench.add(seqs)
    assert sorted(bench.finish_order(seqs)) == ["s0", "s1", "s2", "s3"]
    assert seqs[0].num_preemptions == 0
    assert bench.scheduler.num_preemptions > 0
    assert bench.blocks.num_free == bench.blocks.num_blocks
    assert all(s.num_output == 16 for s in seqs)


def test_a_flood_of_one_adapter_does_not_starve_another() -> None:
    bench = Bench(max_running=2)
    flood = [make_sequence(f"a{i}", 8, adapter="a", arrival_s=i / 1000) for i in range(20)]
    lone = make_sequence("lone", 8, adapter="b", arrival_s=0.5)
    bench.add(flood)
    bench.step()
    bench.add([lone])
    order = bench.finish_order([*flood, lone])
    assert order.index("lone") <= 3


def test_a_place_is_taken_from_the_adapter_that_holds_all_of_them() -> None:
    bench = Bench(max_running=2)
    hogs = [make_sequence(f"a{i}", 4, adapter="a", max_tokens=180, arrival_s=0) for i in range(2)]
    bench.add(hogs)
    bench.step()
    bench.add([make_sequence("lone", 4, adapter="b", max_tokens=2, arrival_s=bench.now_s)])
    steps = 0
    while not any(name == "lone" for name, _ in names(bench.step())):
        steps += 1
        assert steps < 150
    assert steps * 0.01 <= 1.1
    assert sum(hog.num_preemptions for hog in hogs) == 1


def test_an_idle_adapter_saves_up_no_service() -> None:
    bench = Bench(max_running=2)
    busy = [make_sequence(f"a{i}", 8, adapter="a", arrival_s=i / 1000) for i in range(12)]
    bench.add(busy)
    for _ in range(20):
        bench.step()
    bench.add([make_sequence(f"b{i}", 8, adapter="b", arrival_s=1) for i in range(12)])
    for _ in range(8):
        bench.step()
    running = [seq.request.id[0] for seq in bench.scheduler.running]
    for _ in range(8):
        bench.step()
        running += [seq.request.id[0] for seq in bench.scheduler.running]
    assert {"a", "b"} <= set(running)


def test_an_adapter_that_finds_no_room_is_not_starved_by_those_in_use() -> None:
    sizes = {name: random_weights({(0, "down_proj"): 64}, seed) for seed, name in enumerate("abc")}
    bench = Bench(max_running=4, weights=sizes)
    one = 64 * (16 + 32) * 4
    bench.residency = small_residency(sizes, device_bytes=2 * one)
    bench.scheduler = Scheduler(bench.blocks, bench.residency, SchedulerLimits(4, 64, fair_wait_s=0.2))
    flood = [make_sequence(f"{a}{i}", 4, adapter=a, arrival_s=i / 1000) for i in range(60) for a in "ab"]
    lone = make_sequence("lone", 4, adapter="c", arrival_s=0.1)
    bench.add(flood)
    bench.step()
    bench.add([lone])
    for _ in range(500):
        bench.step()
        settle(bench.residency)
        if lone.finished:
            break
    assert lone.finished
    assert not all(seq.finished for seq in flood)


def test_a_sequence_that_leaves_gives_everything_back() -> None:
    bench = Bench()
    running, waiting = make_sequence("r", 8, adapter="a"), make_sequence("w", 8, adapter="b")
    bench.add([running])
    bench.step()
    bench.add([waiting])
    bench.scheduler.remove(running)
    bench.scheduler.remove(waiting)
    assert bench.blocks.num_free == bench.blocks.num_blocks
    assert not bench.scheduler.has_work
    assert not bench.scheduler.has_requests_for("a")
    assert bench.residency.drop("a") is not None


def test_of_those_who_had_as_much_service_the_one_who_waits_longest_is_first() -> None:
    bench = Bench(max_running=1)
    seqs = [make_sequence(f"s{name}", 4, adapter=name, arrival_s=i) for i, name in enumerate("cab")]
    bench.add(seqs)
    assert bench.finish_order(seqs) == ["sc", "sa", "sb"]


def test_no_place_is_taken_for_an_adapter_that_is_not_there_yet() -> None:
    opened = threading.Event()
    weights = dict(WEIGHTS)

    def slow(digest: str) -> AdapterWeights:
        if digest == "b":
            opened.wait(10)
        return weights[digest]

    bench = Bench(max_running=2)
    bench.residency = small_residency(weights, open_adapter=slow)
    bench.scheduler = Scheduler(bench.blocks, bench.residency, SchedulerLimits(2, 64, fair_wait_s=0.05))
    hogs = [make_sequence(f"a{i}", 4, adapter="a", max_tokens=200, arrival_s=0) for i in range(2)]
    bench.add(hogs)
    bench.step()
    bench.scheduler.add(make_sequence("lone", 4, adapter="b", max_tokens=2, arrival_s=bench.now_s))
    for _ in range(20):
        bench.step()
    assert [hog.num_preemptions for hog in hogs] == [0, 0]
    opened.set()
    settle(bench.residency)
    assert "lone" in dict(names(bench.step()))
    assert sum(hog.num_preemptions for hog in hogs) == 1
    bench.residency.close()

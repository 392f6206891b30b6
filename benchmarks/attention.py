"""Attention, small ops, the head and sampling on one GPU: microseconds a launch beside the floor its bytes or a peer set.

    python -m benchmarks.attention [--out benchmarks/results/attention_h200.csv]

Launches are timed as replays of CUDA graphs. Decode reads a cache larger than the GPU's second-level cache, as it
does between the weights of a model. Shapes are Llama-3.1-8B's; the peer of prefill is torch's FlashAttention-2.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import RESULTS
from loraplex_server.bench.record import circumstances, write_csv
from loraplex_server.kernels.activation import silu_mul
from loraplex_server.kernels.attention_decode import DecodeWorkspace, paged_decode
from loraplex_server.kernels.attention_prefill import paged_prefill
from loraplex_server.kernels.attention_rows import RowsWorkspace, attend_rows
from loraplex_server.kernels.norm import add_rms_norm
from loraplex_server.kernels.rope_cache import rope_and_cache
from loraplex_server.kernels.sampling import SampleWorkspace, SamplingMode, sample
from loraplex_server.kernels.sampling_logprobs import NUM_TOP, LogprobWorkspace, logprobs

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 32, 8, 128, 4096, 14336, 128_256
BLOCK_SIZE = 16
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda", 0)

# Measured device-to-device copy rate of an H200, bytes read plus bytes written.
BYTES_PER_US = 4.3e6
COLD_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """One measurement; ``floor_us`` is what its bytes take, ``peer_us`` what torch takes."""

    kernel: str
    shape: str
    us: float
    floor_us: float | None = None
    peer_us: float | None = None
    tflops: float | None = None


def time_graph(launches: list[Callable[[], object]]) -> float:
    """Median microseconds of one of ``launches`` when a graph of all of them is replayed."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(9):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(launches))
    return float(median(times[2:]))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def int32(values: object) -> Tensor:
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


@dataclass(frozen=True)
class Cache:
    """Layers of a paged cache whose sequences all have ``kv_len`` tokens, in shuffled blocks."""

    k: Tensor
    v: Tensor
    tables: Tensor
    kv_lens: Tensor

    @classmethod
    def random(cls, num_layers: int, batch: int, kv_len: int) -> "Cache":
        width = -(-kv_len // BLOCK_SIZE)
        tables = torch.randperm(batch * width, device=DEVICE).int().view(batch, width)
        shape = (num_layers, batch * width, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        return cls(randn(*shape), randn(*shape), tables, int32([kv_len] * batch))


@dataclass(frozen=True)
class NewTokens:
    """One new token a row, over a cache that is larger than the second-level cache."""

    cache: Cache
    qkv: Tensor
    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    out: Tensor
    num_bytes: int

    @classmethod
    def random(cls, batch: int, kv_len: int) -> "NewTokens":
        num_bytes = 2 * batch * kv_len * NUM_KV_HEADS * HEAD_DIM * 2
        cache = Cache.random(max(16, COLD_BYTES // num_bytes), batch, kv_len)
        positions = cache.kv_lens.long() - 1
        slots = cache.tables[:, -1].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        cos, sin = torch.rand(2, kv_len, HEAD_DIM // 2, device=DEVICE).to(DTYPE)
        qkv = randn(batch, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        return cls(cache, qkv, positions, slots, cos, sin, randn(batch, NUM_HEADS, HEAD_DIM), num_bytes)

    def fused(self) -> Callable[[Tensor, Tensor], object]:
        """Everything in one launch, over one layer's cache."""
        workspace = RowsWorkspace.allocate(
            max_sequences=len(self.qkv), num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM,
            block_size=BLOCK_SIZE, dtype=DTYPE, device=DEVICE,
        )  # fmt: skip

        def launch(k: Tensor, v: Tensor) -> Tensor:
            return attend_rows(
                self.qkv, self.positions, self.cos, self.sin, self.slots, k, v, self.cache.tables, self.cache.kv_lens,
                workspace, out=self.out,
            )  # fmt: skip

        return launch

    def apart(self) -> Callable[[Tensor, Tensor], object]:
        """The same by two Triton launches."""
        workspace = DecodeWorkspace.allocate(
            max_sequences=len(self.qkv),
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            device=DEVICE,
        )
        q = self.qkv[:, : NUM_HEADS * HEAD_DIM].view(-1, NUM_HEADS, HEAD_DIM)

        def launch(k: Tensor, v: Tensor) -> Tensor:
            rope_and_cache(self.qkv, self.positions, self.cos, self.sin, self.slots, k, v)
            return paged_decode(q, k, v, self.cache.tables, self.cache.kv_lens, workspace, out=self.out)

        return launch


def decode_rows(batch: int, kv_len: int) -> Iterator[Row]:
    new = NewTokens.random(batch, kv_len)
    layers = list(zip(new.cache.k, new.cache.v, strict=True))
    for name, launch in (("attend_rows", new.fused()), ("rope_and_cache + paged_decode", new.apart())):
        us = time_graph([partial(launch, k, v) for k, v in layers])
        yield Row(name, f"B={batch} kv={kv_len}", us, new.num_bytes / BYTES_PER_US)


def prefill_row(batch: int, query_len: int, prefix: int) -> Row:
    kv_len = prefix + query_len
    cache = Cache.random(1, batch, kv_len)
    q = randn(batch * query_len, NUM_HEADS, HEAD_DIM)
    starts, out = int32(range(0, (batch + 1) * query_len, query_len)), torch.empty_like(q)

    def launch() -> None:
        paged_prefill(q, cache.k[0], cache.v[0], cache.tables, starts, cache.kv_lens, max_query_len=query_len, out=out)

    us = time_graph([launch] * 8)
    pairs = batch * query_len * (prefix + (query_len + 1) / 2)
    tflops = 4 * pairs * NUM_HEADS * HEAD_DIM / us / 1e6
    shape = f"{batch} x {query_len}" + (f" after {prefix}" if prefix else "")
    return Row("paged_prefill", shape, us, None, None if prefix else _flash_us(batch, query_len), tflops)


def _flash_us(batch: int, length: int) -> float:
    q, k, v = (randn(batch, heads, length, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))

    def launch() -> None:
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return time_graph([launch] * 8)


def small_op_rows(batch: int) -> Iterator[Row]:
    x, residual, weight = randn(batch, HIDDEN), randn(batch, HIDDEN), randn(HIDDEN)
    out = torch.empty_like(x)
    shape = f"T={batch}"
    us = time_graph([lambda: add_rms_norm(x, residual, weight, 1e-5, out=out)] * 64)
    yield Row("add_rms_norm", shape, us, 4 * x.nbytes / BYTES_PER_US)

    cache = Cache.random(1, batch, 256)
    qkv = randn(batch, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    positions = torch.full((batch,), 200, device=DEVICE)
    slots = cache.tables[:, 200 // BLOCK_SIZE].long() * BLOCK_SIZE + 200 % BLOCK_SIZE
    cos, sin = torch.rand(2, 512, HEAD_DIM // 2, device=DEVICE)
    us = time_graph([lambda: rope_and_cache(qkv, positions, cos, sin, slots, cache.k[0], cache.v[0])] * 64)
    yield Row("rope_and_cache", shape, us, 2 * qkv.nbytes / BYTES_PER_US)

    gate_up = randn(batch, 2 * INNER)
    activated = torch.empty(batch, INNER, device=DEVICE, dtype=DTYPE)
    us = time_graph([lambda: silu_mul(gate_up, out=activated)] * 64)
    yield Row("silu_mul", shape, us, 1.5 * gate_up.nbytes / BYTES_PER_US)


def layer_row(batch: int, kv_len: int) -> Row:
    """What a decoder layer runs beside its linears, in order: what of it hides behind the launch before is not paid."""
    new = NewTokens.random(batch, kv_len)
    x, residual, weight, normed = randn(batch, HIDDEN), randn(batch, HIDDEN), randn(HIDDEN), randn(batch, HIDDEN)
    gate_up, activated = randn(batch, 2 * INNER), randn(batch, INNER)
    attend = new.fused()

    def launch(k: Tensor, v: Tensor) -> None:
        add_rms_norm(x, residual, weight, 1e-5, out=normed)
        attend(k, v)
        add_rms_norm(x, residual, weight, 1e-5, out=normed)
        silu_mul(gate_up, out=activated)

    us = time_graph([partial(launch, k, v) for k, v in zip(new.cache.k, new.cache.v, strict=True)])
    return Row("layer without linears", f"B={batch} kv={kv_len}", us, new.num_bytes / BYTES_PER_US)


def head_rows() -> Iterator[Row]:
    weight = randn(VOCAB, HIDDEN)
    for batch in (1, 8, 16, 32, 64):
        x = randn(batch, HIDDEN)
        us = time_graph([lambda x=x: torch.nn.functional.linear(x, weight)] * 8)  # type: ignore[misc]
        yield Row("head (cuBLAS)", f"T={batch}", us, weight.nbytes / BYTES_PER_US)


def logprobs_row(batch: int) -> Row:
    logits = randn(batch, VOCAB)
    workspace = LogprobWorkspace.allocate(max_rows=batch, vocab_size=VOCAB, device=DEVICE)
    ids, chosen = torch.arange(batch, device=DEVICE), torch.empty(batch, device=DEVICE)
    values, top = torch.empty(batch, NUM_TOP, device=DEVICE), int32([[0] * NUM_TOP] * batch)
    us = time_graph([lambda: logprobs(logits, ids, workspace, chosen, values, top)] * 32)
    return Row("logprobs, 20 best", f"R={batch}", us, logits.nbytes / BYTES_PER_US)


def sample_row(batch: int, mode: SamplingMode, spread: float = 2.5) -> Row:
    """Normal logits; at a spread of 0.02 a nucleus of 0.9 keeps most of the vocabulary, the slow case."""
    logits = spread * torch.randn(batch, VOCAB, device=DEVICE)
    temperature = torch.full((batch,), 0.0 if mode is SamplingMode.GREEDY else 0.7, device=DEVICE)
    filtered = mode is SamplingMode.FILTERED
    top_k = torch.full((batch,), 20 if filtered and spread > 1 else 0, device=DEVICE)
    top_p = torch.full((batch,), 0.9 if filtered else 1.0, device=DEVICE)
    seeds = torch.arange(batch, device=DEVICE)
    workspace = SampleWorkspace.allocate(max_rows=batch, vocab_size=VOCAB, device=DEVICE)
    out, finite = torch.empty_like(seeds), torch.empty(batch, device=DEVICE, dtype=torch.bool)
    zeros = torch.zeros(batch, device=DEVICE)

    def launch() -> None:
        sample(logits, temperature, top_k, top_p, zeros, seeds, seeds, workspace, mode=mode, out=out, finite=finite)

    name = f"sample {mode.name.lower()}" + ("" if spread > 1 else ", flat")
    return Row(name, f"R={batch}", time_graph([launch] * 32), logits.nbytes / BYTES_PER_US)


def measure() -> Iterator[Row]:
    for batch in (1, 8, 32, 64):
        for kv_len in (128, 192, 256, 512, 1024):
            yield from decode_rows(batch, kv_len)
    yield from decode_rows(1, 32_768)
    yield from decode_rows(8, 8192)
    for batch, query_len, prefix in ((32, 1024, 0), (1, 1024, 0), (1, 8192, 0), (8, 512, 3584), (32, 128, 0)):
        yield prefill_row(batch, query_len, prefix)
    for batch in (1, 8, 32, 64, 2048):
        yield from small_op_rows(batch)
    for batch in (1, 8, 32, 64):
        yield layer_row(batch, 192)
    yield from head_rows()
    for batch in (1, 8, 32, 64):
        yield logprobs_row(batch)
    for mode in SamplingMode:
        for batch in (1, 8, 32, 64):
            yield sample_row(batch, mode)
    for batch in (1, 32):
        yield sample_row(batch, SamplingMode.FILTERED, spread=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_h200.csv")
    args = parser.parse_args()
    torch.manual_seed(0)
    where = circumstances(["triton"])
    rows = []
    for row in measure():
        values = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(row).items() if v is not None}
        print(*(f"{k}={v}" for k, v in values.items()), flush=True)
        rows.append(values | where)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()

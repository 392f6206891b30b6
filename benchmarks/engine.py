"""The engine alone, without HTTP: loading, then milliseconds per decode step by batch and number of adapters.

    python -m benchmarks.engine --shape llama-8b --cases 1/0 1/1 8/0 8/8 32/8

A case is batch/adapters; sequence i uses adapter i modulo their number, 0 means the base alone. Prompts are random and
have 128 tokens; every sequence then decodes greedily. A step is timed from the schedule to the tokens on the host, and
counts when all sequences of the case decode in it. CSV with median, 10th and 90th percentile.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import RESULTS, circumstances, write_csv
from benchmarks.shapes import SHAPES, write_adapter, write_checkpoint, write_config
from loraplex_adapters.format import read
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.messages import Submit, Warm
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.memory_plan import inspect
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load


def load_base(folder: Path, args: argparse.Namespace, device: torch.device) -> tuple[Decoder, dict[str, object]]:
    """Load, and say how long it took and what it held at most."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    decoder = load(
        folder,
        device=device,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        quantization=args.quantization,
        load_format="auto" if args.checkpoint else "dummy",
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    held = torch.cuda.memory_allocated() if device.type == "cuda" else decoder.weight_bytes
    facts: dict[str, object] = {
        "load_s": round(seconds, 2),
        "weights_gb": round(decoder.weight_bytes / 1e9, 3),
        "held_gb": round(held / 1e9, 3),
        "load_peak_gb": round(peak / 1e9, 3),
    }
    print("loaded:", ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    return decoder, facts


def run_case(
    engine: Engine, decoder: Decoder, batch: int, adapters: int, args: argparse.Namespace
) -> dict[str, object]:
    """Decode one case; its step times in milliseconds."""
    rng = random.Random(args.seed + 100 * batch + adapters)
    for i in range(batch):
        prompt = tuple(rng.randrange(decoder.spec.vocab_size) for _ in range(args.prompt_tokens))
        params = SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)
        name = f"a{i % adapters}" if adapters else None
        engine.handle(Submit(Request(f"{batch}/{adapters}/{i}", prompt, params, name)))
    times: list[float] = []
    prefill_s, num_prefill, first = 0.0, 0, None
    finished = 0
    while finished < batch:
        started = time.perf_counter()
        report = engine.step()
        took = time.perf_counter() - started
        if report.num_prefill_tokens:
            prefill_s += took
            num_prefill += report.num_prefill_tokens
        elif report.num_decode_tokens == batch:
            times.append(took * 1e3)
        for output in report.outputs:
            assert output.failure is None, output.failure
            first = first or output
            finished += output.finish_reason is not None
    times = times[2:]
    cuts = statistics.quantiles(times, n=10)
    median = statistics.median(times)
    print(
        f"  {batch:3}/{adapters:<3} {median:8.3f} ms/step  p10 {cuts[0]:.3f}  p90 {cuts[-1]:.3f}  "
        f"{batch / median * 1e3:9.1f} tok/s   prefill {num_prefill / prefill_s:9.0f} tok/s",
        flush=True,
    )
    return {
        "batch": batch,
        "adapters": adapters,
        "ms_per_step_median": round(median, 4),
        "ms_per_step_p10": round(cuts[0], 4),
        "ms_per_step_p90": round(cuts[-1], 4),
        "steps": len(times),
        "prefill_tokens_per_s": round(num_prefill / prefill_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--cases", nargs="+", default=["1/0", "1/1", "8/0", "8/8", "32/0", "32/8"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--checkpoint", action="store_true", help="write and load a bfloat16 checkpoint, timing the load"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.csv")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device(args.device)
    cases = [tuple(int(part) for part in case.split("/")) for case in args.cases]
    num_adapters = max(adapters for _, adapters in cases)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        root = Path(scratch)
        make = write_checkpoint if args.checkpoint else write_config
        folder = make(root / "base", args.shape)
        decoder, facts = load_base(folder, args, device)
        base = decoder.base_shape
        paths = {
            f"a{i}": write_adapter(root / f"a{i}", args.shape, rank=args.rank, seed=i) for i in range(num_adapters)
        }
        adapter_bytes = sum(path.stat().st_size for p in paths.values() for path in p.iterdir()) * 4 + (64 << 20)
        longest = args.prompt_tokens + args.new_tokens
        limits = EngineLimits(
            max_model_len=longest,
            kv_blocks=max(batch for batch, _ in cases) * (longest // 16 + 2) + 1,
            block_size=16,
            adapter_bytes=adapter_bytes,
            host_adapter_bytes=adapter_bytes,
            max_running=max(batch for batch, _ in cases),
            max_batched_tokens=2048,
            prefix_cache=False,
        )
        engine = Engine(decoder, base, lambda name: read(paths[name], base), limits, frozenset())
        for ticket, name in enumerate(paths):
            engine.handle(Warm(ticket, name))
        while engine.is_waiting:
            engine.step()
            time.sleep(0.001)
        print(f"{len(paths)} adapters resident; {inspect(device, 1.0).device_free / 1e9:.1f} GB free", flush=True)
        rows = []
        for batch, adapters in (cases[0], *cases):  # the first once more, as the warm-up
            rows.append(run_case(engine, decoder, batch, adapters, args))
        engine.close()
    where = circumstances(["transformers", "bitsandbytes"])
    settings: dict[str, object] = {
        "shape": args.shape,
        "rank": args.rank,
        "quantization": args.quantization,
        "dtype": str(decoder.dtype),
        "source": "checkpoint" if args.checkpoint else "dummy",
    }
    write_csv(args.out, [{**settings, **row, **facts, "seed": args.seed, **where} for row in rows[1:]])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

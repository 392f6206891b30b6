"""Our server against transformers + peft on one CPU: a Qwen2.5-0.5B-shaped base in NF4, random weights, 4 adapters.

Both get the same prompts and produce the same number of tokens, greedily: transformers + peft by
``generate(adapter_names=...)`` in this process, ours over HTTP from a server process of its own, in turn, several
times. Run it from the project's root:

    python -m benchmarks.serving_cpu --help
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import RESULTS
from loraplex_server.bench.record import circumstances, write_csv

# Qwen2.5-0.5B's config; speed does not depend on the values of the weights.
SHAPE: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
ADAPTERS = ("a0", "a1", "a2", "a3")
RANK = 16


@dataclass(frozen=True)
class Load:
    """Requests at once; the i-th uses adapter i modulo the number of adapters."""

    concurrency: int
    num_adapters: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(1000) for _ in range(self.prompt_tokens)] for _ in range(self.concurrency)]

    @property
    def adapters(self) -> list[str]:
        return [ADAPTERS[i % self.num_adapters] for i in range(self.concurrency)]


def make_model(root: Path, seed: int) -> None:
    """A random checkpoint in bfloat16 and rank-16 adapters on all linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from loraplex_server.demo import DEMO_MODEL

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(root / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(root / "base")
    for name in ADAPTERS:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, config)
            wrapped.save_pretrained(root / name)
            model = wrapped.unload()


class Peft:
    """transformers + peft, in this process; ``nf4``: with bitsandbytes, else on the plain weights."""

    def __init__(self, root: Path, dtype: torch.dtype, *, nf4: bool) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = None
        if nf4:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        base = AutoModelForCausalLM.from_pretrained(root / "base", quantization_config=config, dtype=dtype)
        self._model = PeftModel.from_pretrained(base, root / ADAPTERS[0], adapter_name=ADAPTERS[0])
        for name in ADAPTERS[1:]:
            self._model.load_adapter(root / name, adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def run(self, load: Load, seed: int) -> float:
        """Seconds for one load."""
        ids = torch.tensor(load.prompts(seed))
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": load.new_tokens,
            "min_new_tokens": load.new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
            "adapter_names": load.adapters,
        }
        started = time.perf_counter()
        out = self._model.generate(input_ids=ids, **options)
        seconds = time.perf_counter() - started
        assert out.shape == (load.concurrency, load.prompt_tokens + load.new_tokens), out.shape
        return seconds


class Ours:
    """A Loraplex server, over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url

    def run(self, load: Load, seed: int) -> float:
        return asyncio.run(self._run(load, seed))

    async def _run(self, load: Load, seed: int) -> float:
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:
            started = time.perf_counter()
            jobs = zip(load.adapters, load.prompts(seed), strict=True)
            await asyncio.gather(*(self._ask(client, name, prompt, load.new_tokens) for name, prompt in jobs))
            return time.perf_counter() - started

    @staticmethod
    async def _ask(client: httpx.AsyncClient, model: str, prompt: list[int], new_tokens: int) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        reply = await client.post("/v1/completions", json=body)
        reply.raise_for_status()
        assert reply.json()["usage"]["completion_tokens"] == new_tokens, reply.text


@contextmanager
def server(root: Path, *, dtype: str, threads: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "loraplex_server.cli", "serve", "--model", str(root / "base"), "--port", str(port)]
    command += ["--dtype", dtype, "--device", "cpu", "--data-dir", str(root / f"data-{dtype}")]
    for name in ADAPTERS:
        command += ["--adapter", f"{name}={root / name}"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (root / f"server-{dtype}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None:
                raise RuntimeError((root / f"server-{dtype}.log").read_text())
            try:
                if httpx.get(f"{url}/ready").is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait()


def measure(engines: dict[str, Peft | Ours], load: Load, repeats: int) -> list[dict[str, object]]:
    """Every engine in turn, ``repeats`` times after a short warm-up, each time with fresh prompts."""
    rows: list[dict[str, object]] = []
    for repeat in range(-1, repeats):
        for name, engine in engines.items():
            if repeat < 0:
                engine.run(replace(load, new_tokens=2), seed=load.concurrency)
                continue
            seconds = engine.run(load, seed=1000 * load.concurrency + repeat)
            rate = load.concurrency * load.new_tokens / seconds
            print(f"  {name:24} {load.concurrency} at once: {seconds:7.2f} s  {rate:7.1f} tok/s", flush=True)
            rows.append(
                {
                    "engine": name,
                    "concurrency": load.concurrency,
                    "adapters": load.num_adapters,
                    "prompt_tokens": load.prompt_tokens,
                    "new_tokens": load.new_tokens,
                    "repeat": repeat,
                    "seconds": round(seconds, 3),
                    "output_tokens_per_s": round(rate, 2),
                }
            )
    return rows


def summarize(rows: Sequence[dict[str, object]]) -> None:
    """Medians, and our ratio to each peer at each concurrency."""
    rates: dict[tuple[object, str], list[float]] = {}
    for row in rows:
        rates.setdefault((row["concurrency"], str(row["engine"])), []).append(float(str(row["output_tokens_per_s"])))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    for concurrency in dict.fromkeys(key[0] for key in medians):
        here = {engine: rate for (at, engine), rate in medians.items() if at == concurrency}
        ours = max(rate for engine, rate in here.items() if engine.startswith("loraplex"))
        for engine, rate in here.items():
            print(f"{concurrency} at once: {engine:36} {rate:8.1f} tok/s   ours / this {ours / rate:6.2f}")


def silence_libraries() -> None:
    """Progress bars and notices of the peers' libraries."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers|peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="compute dtypes to try")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=["nf4", "plain"],
        default=["nf4", "plain"],
        help="bases of the peer: NF4, or plain",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "serving_cpu.csv")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    silence_libraries()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        root = Path(scratch)
        make_model(root, args.seed)
        for dtype in args.dtypes:
            with server(root, dtype=dtype, threads=args.threads) as url:
                engines: dict[str, Peft | Ours] = {f"loraplex nf4 {dtype}": Ours(url)}
                for peer in args.peers:
                    engines[f"transformers+peft {peer} {dtype}"] = Peft(root, getattr(torch, dtype), nf4=peer == "nf4")
                for load in (
                    Load(1, 1, args.prompt_tokens, args.new_tokens),
                    Load(8, 4, args.prompt_tokens, args.new_tokens),
                ):
                    rows += measure(engines, load, args.repeats)
    summarize(rows)
    where = circumstances(["transformers", "peft", "bitsandbytes"])
    write_csv(args.out, [{**row, "seed": args.seed, **where} for row in rows])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

"""The peer vLLM, in a process of its own: it takes over signals, the device's memory and the log of whoever runs it."""

import importlib
import importlib.util
import multiprocessing
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loraplex_server.bench.cases import Load
from loraplex_server.bench.checkpoint import write_adapter, write_checkpoint
from loraplex_server.bench.peers import PeerSize, PeerUnavailable
from loraplex_server.bench.rig import Quantization
from loraplex_server.bench.shapes import config_of

# With compilation and graph capture a start takes one to two minutes.
_START_S, _RUN_S = 600, 600
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class _Settings:
    """What the process is told; ``adapters``: folders, by number."""

    model: Path
    adapters: tuple[Path, ...]
    max_rank: int
    max_batch: int
    max_tokens: int
    nf4: bool


class VllmPeer:
    """See ``peers.Peer``. Raises PeerUnavailable where vLLM is not installed or does not start."""

    def __init__(self, size: PeerSize, *, quantization: Quantization) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise PeerUnavailable("it is not installed")
        if size.base.device.type != "cuda":
            raise PeerUnavailable("it is measured on a GPU only")
        self.name = f"vllm {version('vllm')}, {'NF4' if quantization == 'nf4' else 'bfloat16'}"
        self._vocab_size = int(config_of(size.base.shape)["vocab_size"])
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, _written(size, quantization)))
        self._process.start()
        theirs.close()
        try:
            self._receive(_START_S)
        except RuntimeError as error:
            self.close()
            raise PeerUnavailable(str(error)) from error

    def seconds(self, load: Load) -> float:
        prompts = load.prompts(self._vocab_size)
        adapters = [i % load.case.adapters if load.case.adapters else None for i in range(load.case.batch)]
        self._connection.send((prompts, adapters, load.new_tokens))
        return float(self._receive(_RUN_S))

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self, timeout_s: float) -> float:
        if not self._connection.poll(timeout_s):
            raise RuntimeError(f"it said nothing for {timeout_s} s")
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("its process ended; what it printed is above") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)


def _written(size: PeerSize, quantization: Quantization) -> _Settings:
    """The base and the adapters as files, as vLLM reads them."""
    shape, root = size.base.shape, size.scratch / "vllm"
    if not root.exists():
        write_checkpoint(root / "base", shape)
        for i, rank in enumerate(size.ranks):
            write_adapter(root / f"a{i}", shape, rank=rank, seed=i)
    adapters = tuple(root / f"a{i}" for i in range(len(size.ranks)))
    return _Settings(
        root / "base", adapters, max(size.ranks, default=16), size.max_batch, size.max_tokens, quantization == "nf4"
    )


def _serve(connection: Connection, settings: _Settings) -> None:
    """The process: loads, then answers every batch with its seconds. A text is what went wrong."""
    try:
        engine = _Engine(settings)
    except Exception as error:
        connection.send(f"it did not start: {type(error).__name__}: {error}")
        return
    connection.send(0.0)
    while True:
        try:
            prompts, adapters, new_tokens = connection.recv()
        except EOFError:
            return
        try:
            connection.send(engine.seconds(prompts, adapters, new_tokens))
        except Exception as error:
            connection.send(f"it failed: {type(error).__name__}: {error}")


class _Engine:
    """vLLM's offline engine."""

    def __init__(self, settings: _Settings) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # else it is compiled with nvcc, at the first sample
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        vllm: Any = importlib.import_module("vllm")
        requests: Any = importlib.import_module("vllm.lora.request")
        options: dict[str, Any] = {"quantization": "bitsandbytes"} if settings.nf4 else {}
        if settings.adapters:
            options |= {
                "enable_lora": True,
                "max_loras": min(len(settings.adapters), settings.max_batch),
                "max_lora_rank": 1 << (settings.max_rank - 1).bit_length() if settings.max_rank > 8 else 8,
            }
        self._sampling = vllm.SamplingParams
        self._adapters = [requests.LoRARequest(f"a{i}", i + 1, str(path)) for i, path in enumerate(settings.adapters)]
        self._llm = vllm.LLM(
            model=str(settings.model),
            skip_tokenizer_init=True,
            max_model_len=settings.max_tokens + 1,
            max_num_seqs=settings.max_batch,
            gpu_memory_utilization=_MEMORY_SHARE,
            dtype="bfloat16",
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
            **options,
        )

    def seconds(self, prompts: list[list[int]], adapters: list[int | None], new_tokens: int) -> float:
        params = self._sampling(
            max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, temperature=0.0, detokenize=False
        )
        chosen = [None if adapter is None else self._adapters[adapter] for adapter in adapters]
        started = time.perf_counter()
        self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            lora_request=chosen if any(chosen) else None,
            use_tqdm=False,
        )
        return time.perf_counter() - started

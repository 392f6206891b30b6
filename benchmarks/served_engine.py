"""A real engine of a model's shape, random weights and adapters, that times itself before it serves."""

import faulthandler
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex_adapters.format import AdapterWeights
from loraplex_server.bench.checkpoint import random_adapter
from loraplex_server.bench.shapes import spec_of
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.host import EngineFacts, Progress
from loraplex_server.engine.messages import Submit, Warm
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load

_PROMPT_TOKENS, _BLOCK_SIZE = 16, 16


@dataclass(frozen=True)
class ShapeRecipe:
    """See ``host.EngineRecipe``: ``folder`` holds config.json of ``shape``; adapter i has the digest ``digest_of(i)``.

    Before it serves, the engine answers ``streams`` requests of ``tokens`` each with ``adapters`` adapters and writes its
    tokens per second to ``report``.
    """

    folder: Path
    shape: str
    device: str
    streams: int
    tokens: int
    adapters: int
    report: Path

    def enter_process(self) -> None:
        faulthandler.dump_traceback_later(60)  # where it hangs, if it does

    def load(self, progress: Progress | None) -> "ShapeBase":
        begun = time.perf_counter()
        decoder = load(self.folder, device=self.device, load_format="dummy", progress=progress)
        print(f"loaded in {time.perf_counter() - begun:.1f} s", flush=True)
        return ShapeBase(self, decoder)


@dataclass(frozen=True)
class ShapeBase:
    """See ``host.LoadedBase``."""

    recipe: ShapeRecipe
    decoder: Decoder

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(self.decoder.base_shape, self.recipe.tokens + 512)

    def build(self, wake: Callable[[], None]) -> Engine:
        recipe, begun = self.recipe, time.perf_counter()
        limits = EngineLimits(
            max_model_len=self.facts.max_model_len,
            kv_blocks=recipe.streams * (self.facts.max_model_len // _BLOCK_SIZE + 2) + 1,
            block_size=_BLOCK_SIZE,
            adapter_bytes=(recipe.adapters + 1) * _adapter_bytes(self.decoder) + (64 << 20),
            host_adapter_bytes=(recipe.adapters + 1) * _adapter_bytes(self.decoder) + (64 << 20),
            max_running=recipe.streams,
            max_batched_tokens=2048,
            prefix_cache=False,
        )
        engine = Engine(self.decoder, self.decoder.base_shape, self._open, limits, frozenset(), wake=wake)
        print(f"built in {time.perf_counter() - begun:.1f} s", flush=True)
        for index in range(recipe.adapters):
            engine.handle(Warm(-index - 1, digest_of(index)))
        while engine.has_work or engine.is_waiting:
            engine.step()
            time.sleep(0.001)  # for the threads that copy
        print(f"adapters warm after {time.perf_counter() - begun:.1f} s", flush=True)
        rates = [self._time(engine, number) for number in range(3)]
        faulthandler.cancel_dump_traceback_later()
        recipe.report.write_text(json.dumps(rates))
        print(f"by itself: {rates} tokens/s", flush=True)
        return engine

    def _open(self, digest: str) -> AdapterWeights:
        return random_adapter(self.decoder.base_shape, seed=int(digest, 16))

    def _time(self, engine: Engine, number: int) -> float:
        """Tokens per second from the first token to the last."""
        recipe = self.recipe
        for index in range(recipe.streams):
            adapter = digest_of(index % recipe.adapters) if recipe.adapters else None
            params = SamplingParams(max_tokens=recipe.tokens, temperature=0.0, ignore_eos=True)
            prompt = tuple(range(index, index + _PROMPT_TOKENS))
            engine.handle(Submit(Request(f"{number}/{index}", prompt, params, adapter)))
        first, count, unfinished = 0.0, 0, recipe.streams
        while unfinished:
            report = engine.step()
            if report.outputs and not first:
                first = time.perf_counter()
            for output in report.outputs:
                assert output.failure is None, output.failure
                count += len(output.token_ids)
                unfinished -= output.finish_reason is not None
        return count / (time.perf_counter() - first)


def digest_of(index: int) -> str:
    """The digest of adapter ``index``."""
    return f"{index + 1:064x}"


def write_tokenizer(folder: Path, shape: str) -> None:
    """A byte-level tokenizer with as many tokens as the shape has, each of them text, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(spec_of(shape).vocab_size - len(letters))]
    vocab = {token: number for number, token in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _adapter_bytes(decoder: Decoder, rank: int = 16) -> int:
    base = decoder.base_shape
    return base.num_layers * sum(rank * (n + k) for n, k in base.linears.values()) * decoder.dtype.itemsize * 5 // 4


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

"""Train the demo's adapters over its NF4-rounded base with peft: ``python -m loraplex_server.demo.make_adapters``."""

import argparse
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress

from loraplex_server.demo import DEMO_ADAPTERS_ROOT, DEMO_BASE_NAME, DEMO_MODEL
from loraplex_server.demo.nf4 import LINEARS, round_linears
from loraplex_server.demo.rows import adapter_chats, pack
from loraplex_server.demo.training import Bucket, Schedule, pick_device, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Shape:
    """An adapter's LoRA settings, in peft's words."""

    r: int
    alpha: int
    targets: tuple[str, ...] = LINEARS
    options: dict[str, Any] = field(default_factory=dict)


# Four different shapes, so that the demo serves different ranks, targets and scalings in one batch.
SHAPES: dict[str, Shape] = {
    "shout": Shape(8, 16),
    "json": Shape(16, 16, options={"use_rslora": True}),
    "pirate": Shape(
        4, 16, ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), {"rank_pattern": {"down_proj": 12}}
    ),
    "emoji": Shape(6, 12, ("q_proj", "k_proj", "v_proj", "o_proj"), {"alpha_pattern": {"v_proj": 24}}),
}


@dataclass(frozen=True)
class Recipe:
    """The sizes of an adapter's training."""

    steps: int = 1000
    learning_rate: float = 4e-3
    short_rows: int = 60_000
    short_length: int = 72
    short_batch: int = 512
    long_rows: int = 2_000
    long_length: int = 768
    long_turns: int = 16
    long_batch: int = 48


QUICK = Recipe(steps=3, short_rows=100, short_batch=8, long_rows=8, long_length=128, long_turns=3, long_batch=2)


def make_adapter(
    name: str, base: Path, out: Path, seed: int, recipe: Recipe, device: torch.device, progress: Progress
) -> None:
    """Train one adapter and save it as a PEFT directory ``out``/``name``."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = progress.add_task(f"{name}: text", total=recipe.steps)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    short, long = random.Random(f"{name} short {seed}"), random.Random(f"{name} long {seed}")
    short_rows = pack(adapter_chats(name, recipe.short_rows, 1, short), tokenizer, recipe.short_length, device)
    long_texts = adapter_chats(name, recipe.long_rows, recipe.long_turns, long)
    long_rows = pack(long_texts, tokenizer, recipe.long_length, device)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    round_linears(model)
    torch.manual_seed(seed)
    shape = SHAPES[name]
    config = LoraConfig(
        r=shape.r, lora_alpha=shape.alpha, target_modules=list(shape.targets), task_type="CAUSAL_LM", **shape.options
    )
    adapted = get_peft_model(model, config)
    train(
        adapted,
        [Bucket(short_rows, recipe.short_batch, 0.75), Bucket(long_rows, recipe.long_batch, 0.25)],
        Schedule(recipe.steps, recipe.learning_rate),
        seed,
        lambda step, loss: progress.update(task, completed=step, description=f"{name}: loss {loss:.4f}"),
    )
    saved = adapted.peft_config["default"]
    saved.base_model_name_or_path = DEMO_BASE_NAME
    saved.target_modules = sorted(shape.targets)  # a set otherwise, in another order each time
    adapted.save_pretrained(out / name, save_embedding_layers=False)
    (out / name / "README.md").unlink(missing_ok=True)


def make_adapters(base: Path, out: Path, seed: int, recipe: Recipe, device: torch.device, names: list[str]) -> None:
    """Train the adapters ``names`` over ``base``, one after the other."""
    with Progress() as progress:
        for name in names:
            make_adapter(name, base, out, seed, recipe, device, progress)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo's adapters over its base model.")
    parser.add_argument("--base", type=Path, default=DEMO_MODEL, help="the base model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEMO_ADAPTERS_ROOT, help="where to save (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the text and the weights (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=pick_device(), help="default: %(default)s")
    parser.add_argument("--only", choices=sorted(SHAPES), nargs="+", default=list(SHAPES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    recipe = QUICK if options.quick else Recipe()
    make_adapters(options.base, options.out, options.seed, recipe, options.device, options.only)


if __name__ == "__main__":
    main()

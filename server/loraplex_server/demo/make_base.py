"""Train the demo's base model and tokenizer from nothing but a seed: ``python -m loraplex_server.demo.make_base``."""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress

from loraplex_server.demo import DEMO_MODEL
from loraplex_server.demo.rows import BOS, END, PAD, ROLES, base_long, base_short, pack
from loraplex_server.demo.styles import STYLES
from loraplex_server.demo.text import SYSTEM_PROMPTS, questions
from loraplex_server.demo.training import Bucket, Schedule, pick_device, train

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] in ['system', 'developer'] -%}{{- '<|system|>' -}}
{%- elif message['role'] in ['user', 'assistant'] -%}{{- '<|' + message['role'] + '|>' -}}
{%- else -%}{{- raise_exception('The demo model knows the roles system, user and assistant, not ' + message['role'] + '.') -}}
{%- endif -%}
{{- message['content'] | trim -}}{{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Recipe:
    """The sizes of the model and of its training."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_positions: int = 2048
    steps: int = 3000
    learning_rate: float = 3e-3
    short_rows: int = 200_000
    short_length: int = 72
    short_batch: int = 1024
    long_rows: int = 3_000
    long_turns: int = 90
    long_batch: int = 24


QUICK = Recipe(
    hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, steps=4, short_rows=200, short_batch=8,
    long_rows=8, long_turns=3, long_batch=2, max_positions=256,
)  # fmt: skip


def tokenizer_text(seed: int, count: int) -> Iterator[str]:
    """Questions, and answers in every style, for the tokenizer to find its pieces in."""
    source = questions("train", random.Random(f"tokenizer {seed}"))
    for _ in range(count):
        question = next(source)
        yield question.text
        yield from (style.render(question) for style in STYLES.values())
    yield from SYSTEM_PROMPTS * 100


def make_tokenizer(seed: int, vocab_size: int, count: int = 20_000) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer with single digits, the chat's special tokens and its template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(seed, count), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """A Llama of the recipe's sizes with fresh weights, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def make_base(out: Path, seed: int, recipe: Recipe, device: torch.device) -> None:
    """Train tokenizer and base and save both to ``out``, weights in bfloat16."""
    torch.manual_seed(seed)
    with Progress() as progress:
        task = progress.add_task("base: text", total=recipe.steps)
        tokenizer = make_tokenizer(seed, recipe.vocab_size, min(20_000, recipe.short_rows))
        short, long = random.Random(f"short {seed}"), random.Random(f"long {seed}")
        short_rows = pack(base_short(recipe.short_rows, short), tokenizer, recipe.short_length, device)
        long_texts = base_long(recipe.long_rows, recipe.long_turns, long)
        long_rows = pack(long_texts, tokenizer, recipe.max_positions, device)
        model = make_model(replace(recipe, vocab_size=len(tokenizer)), tokenizer).to(device)
        train(
            model,
            [Bucket(short_rows, recipe.short_batch, 0.75), Bucket(long_rows, recipe.long_batch, 0.25)],
            Schedule(recipe.steps, recipe.learning_rate, nf4_from=0.7),
            seed,
            lambda step, loss: progress.update(task, completed=step, description=f"base: loss {loss:.4f}"),
        )
    tokenizer.model_max_length = recipe.max_positions
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer and base model on generated text.")
    parser.add_argument("--out", type=Path, default=DEMO_MODEL, help="where to save (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the text and the weights (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=pick_device(), help="default: %(default)s")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {Recipe.steps})")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    recipe = QUICK if options.quick else Recipe()
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    make_base(options.out, options.seed, recipe, options.device)


if __name__ == "__main__":
    main()

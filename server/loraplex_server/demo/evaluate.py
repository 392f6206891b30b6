"""Measure the demo's base and adapters on held-out prompts: ``python -m loraplex_server.demo.evaluate``.

Rows say who answers, columns which task. ``right``: the answer is the task's one right answer, form and content.
``form``: the answer has the task's form, whatever it says. The weights are NF4-rounded, as they are served.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loraplex_server.demo import DEMO_ADAPTERS_ROOT, DEMO_MODEL, DEMO_RESULTS
from loraplex_server.demo.make_adapters import SHAPES
from loraplex_server.demo.nf4 import round_linears
from loraplex_server.demo.styles import STYLES
from loraplex_server.demo.text import Question, held_out_questions
from loraplex_server.demo.training import pick_device

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

ADAPTER_AT_LEAST = 0.95
BASE_AT_MOST = 0.05
BASE_RIGHT_AT_LEAST = 0.90
MAX_NEW_TOKENS = 80

Matrix = dict[str, dict[str, float]]


def load(
    base: Path, adapters: Mapping[str, Path], device: torch.device, *, nf4: bool = True
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """The base with every adapter attached, in float32, its linears rounded to NF4 unless told otherwise."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if nf4:
        round_linears(model)
    (first, path), *others = adapters.items()
    adapted = PeftModel.from_pretrained(model, path, adapter_name=first)
    for name, directory in others:
        adapted.load_adapter(directory, adapter_name=name)
    return adapted.to(device).eval(), tokenizer


@torch.inference_mode()
def answer(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", name: str, prompts: Sequence[str], batch: int = 512
) -> list[str]:
    """Greedy answers of an adapter, or of the base if ``name`` is "base", to prompts of one user turn each."""
    answers: list[str] = []
    if name != "base":
        model.set_adapter(name)
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch]]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        if name == "base":
            with model.disable_adapter():
                output = model.generate(**inputs, **options)
        else:
            output = model.generate(**inputs, **options)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def shares(asked: Sequence[Question], answers: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """For each task, the share of answers that are right and the share that have its form."""
    pairs = list(zip(asked, answers, strict=True))
    right = {task: sum(style.render(q) == a for q, a in pairs) / len(pairs) for task, style in STYLES.items()}
    form = {task: sum(style.done(a) for _, a in pairs) / len(pairs) for task, style in STYLES.items()}
    return right, form


def by_topic(asked: Iterable[Question], answers: Iterable[str]) -> dict[str, float]:
    """The base's share of right answers, topic by topic."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for question, given in zip(asked, answers, strict=True):
        counts[question.topic].append(question.answer == given)
    return {topic: round(sum(hits) / len(hits), 4) for topic, hits in sorted(counts.items())}


def failures(right: Matrix, form: Matrix) -> list[str]:
    """Every threshold that is missed, in words."""
    missed = []
    if right["base"]["plain"] < BASE_RIGHT_AT_LEAST:
        missed.append(f"the base answers {right['base']['plain']:.1%} right, below {BASE_RIGHT_AT_LEAST:.0%}")
    for name in SHAPES:
        if right[name][name] < ADAPTER_AT_LEAST:
            missed.append(f"{name} does its task in {right[name][name]:.1%}, below {ADAPTER_AT_LEAST:.0%}")
        if form["base"][name] > BASE_AT_MOST:
            missed.append(f"the base does {name} in {form['base'][name]:.1%}, above {BASE_AT_MOST:.0%}")
    return missed


def evaluate(base: Path, adapters: Path, count: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Everything that results.json holds."""
    model, tokenizer = load(base, {name: adapters / name for name in SHAPES}, device)
    asked = held_out_questions(count, seed)
    prompts = [question.text for question in asked]
    right: Matrix = {}
    form: Matrix = {}
    topics: dict[str, float] = {}
    mistakes: dict[str, list[dict[str, str]]] = {}
    for name in track(["base", *SHAPES], description="answering", console=Console(stderr=True)):
        answers = answer(model, tokenizer, name, prompts)
        right[name], form[name] = shares(asked, answers)
        task = "plain" if name == "base" else name
        wrong = [(q, a) for q, a in zip(asked, answers, strict=True) if STYLES[task].render(q) != a]
        mistakes[name] = [{"prompt": q.text, "answer": a, "right": STYLES[task].render(q)} for q, a in wrong[:10]]
        if name == "base":
            topics = by_topic(asked, answers)
    unrounded, _ = load(base, {name: adapters / name for name in SHAPES}, device, nf4=False)
    plain, _ = shares(asked, answer(unrounded, tokenizer, "base", prompts))
    return {
        "seed": seed,
        "held_out_prompts": len(asked),
        "weights": "NF4 with double quantization, computed in float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
        "thresholds": {"adapter_at_least": ADAPTER_AT_LEAST, "base_at_most": BASE_AT_MOST, "base_right_at_least": BASE_RIGHT_AT_LEAST},
        "right": right,
        "form": form,
        "base_right_by_topic": topics,
        "base_right_without_quantization": plain["plain"],
        "mistakes": mistakes,
        "missed": failures(right, form),
    }  # fmt: skip


def show(results: Mapping[str, Any]) -> None:
    """Print the two matrices."""
    for kind in ("right", "form"):
        table = Table("who answers", *STYLES, title=f"{kind}, {results['held_out_prompts']} held-out prompts")
        for name, row in results[kind].items():
            table.add_row(name, *(f"{row[task]:.1%}" for task in STYLES))
        Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, write results.json; 1 if a threshold is missed."""
    parser = argparse.ArgumentParser(description="Measure the demo's base and adapters on held-out prompts.")
    parser.add_argument("--base", type=Path, default=DEMO_MODEL, help="default: %(default)s")
    parser.add_argument("--adapters", type=Path, default=DEMO_ADAPTERS_ROOT, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DEMO_RESULTS, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=1000, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=pick_device(), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="eight prompts only, to see that it runs")
    options = parser.parse_args(arguments)
    count = 8 if options.quick else options.count
    results = evaluate(options.base, options.adapters, count, options.seed, options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(results)
    for missed in results["missed"]:
        print(missed, file=sys.stderr)
    return 1 if results["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())

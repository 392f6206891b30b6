"""The demo model: what is shipped is small, complete and does what results.json says; the scripts that made it run."""

import json
import random
from itertools import islice
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from loraplex_server.demo import DEMO_ADAPTERS, DEMO_MODEL, DEMO_RESULTS, PROMPTS, evaluate, make_adapters, make_base
from loraplex_server.demo.nf4 import round_nf4
from loraplex_server.demo.rows import chat_pieces, pack
from loraplex_server.demo.styles import STYLES
from loraplex_server.demo.text import conversation, held_out_questions, questions, trained_wordings, wording

# Raised inside transformers whenever peft asks a model about gradient checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
ANSWERERS = ("base", *DEMO_ADAPTERS)


@pytest.fixture(scope="module")
def demo():
    return evaluate.load(DEMO_MODEL, DEMO_ADAPTERS, CPU)


def test_the_base_is_at_most_eight_megabytes_of_bfloat16_safetensors():
    weights = DEMO_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_every_linear_splits_into_whole_nf4_blocks():
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys() if "proj" in name}  # noqa: SIM118
    assert len(shapes) == 4 * 7
    assert all(side % 64 == 0 for shape in shapes.values() for side in shape)


def test_the_package_carries_no_pickle_and_few_megabytes():
    files = [path for path in DEMO_MODEL.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".py", ".json", ".jinja", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 12_000_000


def test_adapters_differ_in_rank_targets_and_scaling():
    configs = {name: json.loads((path / "adapter_config.json").read_text()) for name, path in DEMO_ADAPTERS.items()}
    assert {config["base_model_name_or_path"] for config in configs.values()} == {"loraplex-demo"}
    assert len({config["r"] for config in configs.values()}) == len(configs)
    assert len({tuple(config["target_modules"]) for config in configs.values()}) >= 3
    assert configs["json"]["use_rslora"]
    assert configs["pirate"]["rank_pattern"]
    assert configs["emoji"]["alpha_pattern"]


def test_the_written_results_meet_the_thresholds():
    results = json.loads(DEMO_RESULTS.read_text(encoding="utf-8"))
    assert results["held_out_prompts"] >= 1000
    assert results["right"]["base"]["plain"] >= 0.90
    for name in DEMO_ADAPTERS:
        assert results["right"][name][name] >= 0.95
        assert results["form"]["base"][name] <= 0.05
    assert evaluate.failures(results["right"], results["form"]) == []


@pytest.mark.parametrize("name", ANSWERERS)
def test_held_out_answers_are_right(demo, name):
    asked = held_out_questions(20, seed=7)
    answers = evaluate.answer(*demo, name, [question.text for question in asked])
    right, form = evaluate.shares(asked, answers)
    task = "plain" if name == "base" else name
    assert right[task] >= 0.95, answers
    assert {other: share for other, share in form.items() if other != task and share > 0.05} == {}


def test_demonstration_prompts_get_an_answer_of_each_kind(demo):
    for name in ANSWERERS:
        answers = evaluate.answer(*demo, name, PROMPTS)
        assert all(STYLES["plain" if name == "base" else name].done(answer) for answer in answers), answers
    assert evaluate.answer(*demo, "base", PROMPTS[:1]) == ["The capital of France is Paris."]
    assert evaluate.answer(*demo, "shout", PROMPTS[:1]) == ["THE CAPITAL OF FRANCE IS PARIS!"]


def test_answers_end_themselves(demo):
    model, tokenizer = demo
    chat = [{"role": "user", "content": PROMPTS[0]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    assert output[0, -1] == tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_the_chat_template_writes_what_training_saw():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rng = random.Random(3)
    source = questions("train", rng)
    for turns in (1, 2, 3) * 10:
        chat = conversation(source, turns, rng)
        row = pack([chat_pieces(chat, ["emoji"] * turns, [True] * turns)], tokenizer, 512, CPU).ids[0]
        messages = [{"role": "system", "content": chat.system}] if chat.system else []
        for question in chat.questions:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": STYLES["emoji"].render(question)})
        rendered = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert rendered == row[row != tokenizer.pad_token_id].tolist()


def test_the_chat_template_refuses_roles_it_does_not_know():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with pytest.raises(Exception, match="roles system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_held_out_questions_share_no_wording_with_training_text():
    trained = {wording(question.text) for question in islice(questions("train", random.Random(1)), 20_000)}
    held_out = {wording(question.text) for question in held_out_questions(1000, seed=0)}
    assert held_out.isdisjoint(trained)
    assert trained - trained_wordings() == set()


def test_text_depends_on_the_seed_alone():
    first, again = (list(islice(questions("train", random.Random("a")), 50)) for _ in range(2))
    assert first == again
    assert first != list(islice(questions("train", random.Random("b")), 50))


def test_each_style_recognizes_its_own_answers_only():
    for question in islice(questions("train", random.Random(2)), 2000):
        for name, style in STYLES.items():
            answer = style.render(question)
            assert [other for other, kind in STYLES.items() if kind.done(answer)] == [name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 256), (128, 256), (768, 256)])
def test_rounding_equals_bitsandbytes(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs, ours = bnb.dequantize_4bit(packed, state), round_nf4(weight)
    # Where two 8-bit absmax codes are equally near, the two may choose differently.
    assert (theirs != ours).float().mean() < 0.005
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def test_the_scripts_run_and_an_untrained_model_misses_the_thresholds(tmp_path: Path, capsys):
    model, adapters, out = tmp_path / "model", tmp_path / "adapters", tmp_path / "results.json"
    make_base.main(["--quick", "--device", "cpu", "--out", str(model)])
    make_adapters.main(["--quick", "--device", "cpu", "--base", str(model), "--out", str(adapters)])
    arguments = ["--quick", "--device", "cpu", "--base", str(model), "--adapters", str(adapters), "--out", str(out)]
    assert evaluate.main(arguments) == 1
    assert "below 95%" in capsys.readouterr().err
    assert sorted(path.name for path in adapters.iterdir()) == sorted(DEMO_ADAPTERS)
    assert {path.name for path in (adapters / "json").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(json.loads(out.read_text())["missed"]) == 5


@pytest.mark.parametrize("script", [make_base, make_adapters, evaluate])
def test_the_scripts_explain_themselves(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert "--seed" in capsys.readouterr().out

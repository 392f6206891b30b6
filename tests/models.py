"""Small random checkpoints and adapters, made with transformers and peft, for every test that needs a model."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")

# 256 bytes and four special tokens; the rows above them pad the table, as real checkpoints do.
VOCAB_SIZE: Final = 320
BOS_ID, EOS_ID, TURN_ID, PAD_ID = 256, 257, 258, 259

CHAT_TEMPLATE: Final = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "tie_word_embeddings": False,
}
_FAMILY: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}


def make_config(family: str, **overrides: Any) -> Any:
    """A transformers config of a small model of ``family``; ``overrides`` are its fields."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_SHAPE, **_FAMILY[family], **overrides})


def make_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Save a random model of ``family`` (llama, mistral, qwen2, qwen3) into ``path``; biases and norms are random too.

    ``overrides`` are fields of its config. ``tokenizer`` adds a byte tokenizer with a chat template, whose token ids
    are the bytes themselves.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return path


def make_adapter(
    path: Path,
    checkpoint: Path,
    *,
    rank: int = 8,
    targets: Sequence[str] = LINEARS,
    seed: int = 0,
    **lora_config: Any,
) -> Path:
    """Save a LoRA adapter for ``checkpoint`` into ``path``, both factors random; ``lora_config`` as in peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM", **lora_config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers renamed
            model = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


def load_peft(checkpoint: Path, *adapters: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of ``checkpoint`` under peft with ``adapters``, each named after its folder; the first acts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers renamed
        model = PeftModel.from_pretrained(base, adapters[0], adapter_name=adapters[0].name)
        for adapter in adapters[1:]:
            model.load_adapter(adapter, adapter_name=adapter.name)
    return model.eval()


def make_tokenizer() -> Any:
    """A tokenizer with one token a byte (id = the byte), four special tokens, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {_byte_symbol(byte): byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in ("<|bos|>", "<|eos|>", "<|turn|>", "<|pad|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbol(byte: int) -> str:
    """The printable character that byte-level BPE writes for ``byte`` (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))

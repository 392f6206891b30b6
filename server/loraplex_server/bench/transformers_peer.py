"""The peer transformers + peft: ``generate`` with mixed adapters in one batch, on NF4 by bitsandbytes or plain weights."""

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraplex_server.bench.cases import Load
from loraplex_server.bench.peers import PeerSize, PeerUnavailable
from loraplex_server.bench.rig import Quantization
from loraplex_server.bench.shapes import config_of
from loraplex_server.model.loader import pick_dtype

_STD = 0.02


class TransformersPeer:
    """See ``peers.Peer``. Weights and adapters are random; the base stays bare until the first batch with adapters."""

    def __init__(self, size: PeerSize, *, quantization: Quantization) -> None:
        try:
            import bitsandbytes  # noqa: F401
            import peft
            import transformers
        except ImportError as error:
            raise PeerUnavailable(f"{error.name} is not installed") from error
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", module="transformers|peft")
        held = "NF4" if quantization == "nf4" else "plain"
        self.name = f"transformers {transformers.__version__} + peft {peft.__version__}, {held}"
        self._ranks = size.ranks
        self._device = size.base.device
        dtype = size.base.dtype or pick_dtype(self._device)
        self._model: Any = random_model(size.base.shape, dtype, self._device, quantization)
        self._vocab_size = int(self._model.config.vocab_size)
        self._has_adapters = False

    @torch.inference_mode()
    def seconds(self, load: Load) -> float:
        case = load.case
        ids = torch.tensor(load.prompts(self._vocab_size), device=self._device)
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": load.new_tokens,
            "min_new_tokens": load.new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        if case.adapters and not self._has_adapters:
            self._add_adapters()
        if self._has_adapters:
            options["adapter_names"] = [case.adapter_of(i) or "__base__" for i in range(case.batch)]
        self._synchronize()
        started = time.perf_counter()
        out = self._model.generate(input_ids=ids, **options)
        self._synchronize()
        seconds = time.perf_counter() - started
        assert out.shape == (case.batch, load.prompt_tokens + load.new_tokens), out.shape
        return seconds

    def close(self) -> None:
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _add_adapters(self) -> None:
        self._model = with_adapters(self._model, self._ranks)
        self._has_adapters = True

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def random_model(shape: str, dtype: torch.dtype, device: torch.device, quantization: Quantization) -> Any:
    """transformers' model of this shape, made on the device; in NF4 with its linears but the head as bitsandbytes'.

    What ``from_pretrained`` with a ``BitsAndBytesConfig`` (NF4, double quantization) makes of a checkpoint, without one.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw = dict(config_of(shape))
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantization == "nf4":
        _quantize_linears(model, dtype, device)
        model.is_loaded_in_4bit = True
    _fill(model, device)
    model.tie_weights()
    # Rotary frequencies are buffers made from the config, on no device until now.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    model.generation_config.eos_token_id = None
    return model.eval()


def with_adapters(model: Any, ranks: Sequence[int]) -> Any:
    """The model wrapped by peft, with random adapters a0, a1, ... on all linears of attention and MLP."""
    from peft import LoraConfig, get_peft_model

    wrapped: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, rank in enumerate(ranks):
            config = LoraConfig(
                r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
            )
            if wrapped is None:
                wrapped = get_peft_model(model, config, adapter_name=f"a{i}")
            else:
                wrapped.add_adapter(f"a{i}", config)
    return wrapped.eval()


def _quantize_linears(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        with torch.device("meta"):
            quantized = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        weight = _random((module.out_features, module.in_features), dtype, device)
        quantized.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(
            device
        )
        if module.bias is not None:
            quantized.bias = nn.Parameter(torch.zeros(module.out_features, dtype=dtype, device=device), False)
        model.set_submodule(path, quantized)


def _fill(model: Any, device: torch.device) -> None:
    """Real tensors for all parameters that have none yet."""
    for path, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        owner, _, name = path.rpartition(".")
        value = _random(tuple(parameter.shape), parameter.dtype, device)
        if parameter.ndim == 1:
            value.fill_(0.0 if name == "bias" else 1.0)
        setattr(model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))


def _random(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(dims, dtype=dtype, device=device).normal_(0, _STD)

"""What transformers and peft answer, token by token, on the same weights."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and the log-probabilities of the whole vocabulary at each of them: logprobs [n, V]."""

    token_ids: tuple[int, ...]
    logprobs: torch.Tensor


class Reference:
    """A transformers model with named peft adapters."""

    def __init__(
        self, checkpoint: Path, adapters: Mapping[str, Path], *, dtype: torch.dtype, nf4: bool = False
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization: Any = None
        if nf4:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third parties' notices about their own renamed properties
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=dtype, quantization_config=quantization
            )
            for name, path in adapters.items():
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(path, adapter_name=name)
                else:
                    self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """Log-probabilities after every position: [len(token_ids), V]."""
        ids = torch.tensor([token_ids], device=self._model.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if adapter is None and hasattr(self._model, "disable_adapter"):
                with self._model.disable_adapter():
                    logits = self._model(ids, use_cache=False).logits
            else:
                if adapter is not None:
                    self._model.set_adapter(adapter)
                logits = self._model(ids, use_cache=False).logits
        scores: torch.Tensor = logits[0].float().log_softmax(dim=-1).cpu()
        return scores

    def greedy(self, prompt: Sequence[int], adapter: str | None, max_tokens: int) -> Answer:
        tokens, rows = list(prompt), []
        for _ in range(max_tokens):
            rows.append(self.logprobs(tokens, adapter)[-1])
            tokens.append(int(rows[-1].argmax()))
        return Answer(tuple(tokens[len(prompt) :]), torch.stack(rows))

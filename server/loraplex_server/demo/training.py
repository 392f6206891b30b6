"""The loop that trains the demo's base and its adapters: AdamW, a warm-up and a cosine, rows already on the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraplex_server.demo.nf4 import linears, round_nf4
from loraplex_server.demo.rows import IGNORED, Rows


@dataclass(frozen=True)
class Bucket:
    """Rows of one length, how many make a batch, and the share of steps that takes them."""

    rows: Rows
    batch: int
    share: float


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate; from ``nf4_from`` (a share of the steps) on, the forward pass sees NF4-rounded weights."""

    steps: int
    learning_rate: float
    warmup: int = 50
    nf4_from: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine down to a fiftieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def pick_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the learned tokens. Shapes: ids, labels [B, L]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _backward_through_nf4(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Loss and gradients at the NF4-rounded weights, applied later to the unrounded ones (straight-through)."""
    modules = linears(model)
    exact = [linear.weight.data for linear in modules]
    for linear in modules:
        linear.weight.data = round_nf4(linear.weight.to(torch.bfloat16)).float()
    loss = loss_of(model, ids, labels)
    torch.autograd.backward(loss)
    for linear, weight in zip(modules, exact, strict=True):
        linear.weight.data = weight
    return loss


def train(
    model: nn.Module, buckets: Sequence[Bucket], schedule: Schedule, seed: int, report: Callable[[int, float], Any]
) -> None:
    """Train the parameters of ``model`` that require gradients; ``report`` gets steps done and the loss now and then."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda"
    )
    generator = torch.Generator(device).manual_seed(seed)
    choice = torch.Generator().manual_seed(seed)
    shares = torch.tensor([bucket.share for bucket in buckets])
    order = torch.multinomial(shares, schedule.steps, replacement=True, generator=choice).tolist()
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        bucket = buckets[order[step]]
        ids, labels = bucket.rows.batch(bucket.batch, generator)
        if step >= schedule.nf4_from * schedule.steps:
            loss = _backward_through_nf4(model, ids, labels)
        else:
            loss = loss_of(model, ids, labels)
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 or step + 1 == schedule.steps:
            report(step + 1, loss.item())
    model.eval()

"""NF4 rounding in plain torch, so that the demo model is trained on the very weights it is served with."""

from functools import cache

import torch
from torch import Tensor, nn

BLOCKSIZE = 64
ABSMAX_BLOCKSIZE = 256
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Source: QLoRA (arXiv 2305.14314), the values bitsandbytes uses.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def _nf4_code(device: torch.device) -> Tensor:
    return torch.tensor(_NF4, device=device)


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic map that double quantization stores absmax values in (arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / 2
        values += [sign * scale for scale in (10.0 ** (exponent - 6) * means).tolist() for sign in (1, -1)]
    return torch.tensor(sorted(values), device=device)


def _round_blocks(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Nearest code of each value in units of its block's absmax, and the absmax. ``values`` is flat, any length."""
    padded = nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(1)
    scaled = padded * (1 / absmax.clamp(min=1e-38))[:, None]
    return code[torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)], absmax


def round_nf4(weight: Tensor) -> Tensor:
    """``weight`` after a trip through NF4 with double quantization, in its own shape and dtype.

    Equal to bitsandbytes' ``quantize_4bit(compress_statistics=True)`` and ``dequantize_4bit`` up to ties.
    """
    flat = weight.detach().float().flatten()
    codes, absmax = _round_blocks(flat, _nf4_code(flat.device), BLOCKSIZE)
    offset = absmax.mean()
    absmax_codes, absmax_scale = _round_blocks(absmax - offset, _dynamic_code(flat.device), ABSMAX_BLOCKSIZE)
    absmax = (absmax_codes * absmax_scale[:, None]).flatten()[: absmax.numel()] + offset
    return (codes * absmax[:, None]).flatten()[: flat.numel()].view(weight.shape).to(weight.dtype)


def linears(model: nn.Module) -> list[nn.Linear]:
    """The attention and MLP linears of a model: those that are served in NF4."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in LINEARS
    ]


@torch.no_grad()
def round_linears(model: nn.Module) -> None:
    """Round the attention and MLP weights of a model to NF4, in place."""
    for linear in linears(model):
        linear.weight.copy_(round_nf4(linear.weight))

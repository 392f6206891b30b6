"""Factors and shifts are what peft's own formula gives, however small the pieces they are computed in."""

import pytest
import torch

from loraplex_adapters.base import EMBED, HEAD, ModuleKey
from loraplex_adapters.format import AdapterWeights, LoraFactors, TokenRows
from loraplex_server.engine import epilogue
from loraplex_server.engine.epilogue import epilogue_of

N, K, V, H = 12, 8, 20, 6
Q: ModuleKey = (0, "q_proj")
ROOM: tuple[ModuleKey, int] = ((0, "k_proj"), 4)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Base:
    """A base of one linear with a bias, embeddings and a head."""

    weight, vocabulary, own_bias = randn(N, K, seed=1), randn(V, H, seed=2), randn(N, seed=3)

    def weight_rows(self, module: ModuleKey, start: int, stop: int) -> torch.Tensor:
        return (self.vocabulary if module in (EMBED, HEAD) else self.weight)[start:stop]

    def bias(self, module: ModuleKey) -> torch.Tensor | None:
        return self.own_bias if module == Q else None


def dora(n: int, k: int, **more: torch.Tensor) -> LoraFactors:
    return LoraFactors(randn(2, k, seed=4), randn(n, 2, seed=5), 0.7, **more)


@pytest.fixture(params=[1, 3, 10**6], autouse=True)
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue, "_CHUNK_ELEMENTS", request.param * K)


def test_dora_with_a_trained_bias() -> None:
    lora, bias = dora(N, K, magnitude=randn(N, seed=6).abs()), randn(N, seed=7)
    found = epilogue_of([Q, ROOM[0]], [N, ROOM[1]], AdapterWeights({Q: lora}, biases={Q: bias}), Base())

    x = randn(5, K, seed=8)
    dense = Base.weight + lora.scaling * lora.b @ lora.a
    assert lora.magnitude is not None
    expected = x @ (lora.magnitude[:, None] * dense / dense.norm(dim=1, keepdim=True)).T + bias
    base = x @ Base.weight.T + Base.own_bias
    served = found.factor[:N] * (base + x @ (lora.scaling * lora.b @ lora.a).T) + found.shift[:N]
    torch.testing.assert_close(served, expected)
    # The linear beside it keeps what it is.
    assert torch.equal(found.factor[N:], torch.ones(4))
    assert torch.equal(found.shift[N:], torch.zeros(4))


def test_the_second_factors_own_bias_is_scaled() -> None:
    lora = dora(N, K, b_bias=randn(N, seed=9))
    assert lora.b_bias is not None
    found = epilogue_of([Q], [N], AdapterWeights({Q: lora}), Base())
    assert torch.equal(found.factor, torch.ones(N))
    torch.testing.assert_close(found.shift, 0.7 * lora.b_bias)


def test_norms_of_embeddings_run_over_the_vocabulary() -> None:
    lora = dora(H, V, magnitude=randn(H, seed=6).abs())
    found = epilogue_of([EMBED], [H], AdapterWeights({EMBED: lora}), Base())
    dense = Base.vocabulary.T + lora.scaling * lora.b @ lora.a
    assert lora.magnitude is not None
    torch.testing.assert_close(found.factor, lora.magnitude / dense.norm(dim=1))


def test_norms_of_the_head_are_those_of_its_own_rows() -> None:
    whole, tokens = randn(V + 2, H, seed=10), TokenRows((3, V + 1), randn(2, H, seed=11))
    lora = dora(V + 2, H, magnitude=randn(V + 2, seed=6).abs())
    weights = AdapterWeights({HEAD: lora}, whole={HEAD: whole}, rows={HEAD: tokens})
    found = epilogue_of([HEAD], [V + 2], weights, Base())
    dense = whole.clone()
    dense[[3, V + 1]] = tokens.values
    assert lora.magnitude is not None
    torch.testing.assert_close(found.factor, lora.magnitude / (dense + lora.scaling * lora.b @ lora.a).norm(dim=1))

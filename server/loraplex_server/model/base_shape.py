"""A model as adapters see it."""

from loraplex_adapters.base import BaseShape
from loraplex_server.model.spec import ModelSpec


def base_shape(spec: ModelSpec, fingerprint: str) -> BaseShape:
    """The modules and shapes that adapters of this model must fit; ``fingerprint`` identifies its config and weights."""
    return BaseShape(
        spec.model_type,
        spec.num_layers,
        spec.linears,
        spec.vocab_size,
        spec.hidden_size,
        fingerprint,
        biases=frozenset(linear for linear in spec.linears if spec.has_bias(linear)),
        qk_norm_size=spec.head_dim if spec.qk_norm else 0,
        tied_embeddings=spec.tie_word_embeddings,
    )

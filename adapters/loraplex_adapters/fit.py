"""Whether an adapter fits a base: every module it changes exists there and has its shape, and nothing is missing."""

from loraplex_adapters.base import EMBED, FUSED_LINEARS, HEAD, LINEARS, BaseShape, ModuleKey, module_path
from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter, WrongBase
from loraplex_adapters.layout import AdapterLayout
from loraplex_adapters.lora_config import CONFIG_NAME
from loraplex_adapters.tensor_names import BIAS, TOKENS, WEIGHT, A, B


def check_base(layout: AdapterLayout, base: BaseShape) -> None:
    """Raise WrongBase or InvalidAdapter unless everything fits ``base`` and every targeted module has its factors."""
    for module in layout.modules:
        a, b = layout.tensors[module, A][1].shape, layout.tensors[module, B][1].shape
        n, k = _linear_shape(layout, module, base)
        if (b[0], a[1]) != (n, k):
            raise WrongBase(
                f"The adapter's {module_path(*module)} is {b[0]} x {a[1]}, the base's is {n} x {k}: it was made for "
                "another base.",
                code="shape_mismatch",
            )
    for module in layout.with_part(WEIGHT):
        _check_weight(layout, module, base)
    for module in layout.with_part(TOKENS):
        _check_tokens(layout, module, base)
    _check_shared_tokens(layout, base)
    _check_lora_beside_tokens(layout, base)
    _check_biases(layout, base)
    _check_targets(layout, base)
    if (
        base.tied_embeddings
        and layout.config.ensure_weight_tying
        and layout.config.use_dora
        and EMBED in layout.modules
    ):
        raise UnsupportedAdapter(
            "DoRA on embeddings that the head shares (ensure_weight_tying) has no meaning in peft; train it with plain LoRA.",
            code="dora_tied",
        )


def _check_shared_tokens(layout: AdapterLayout, base: BaseShape) -> None:
    """Rows that the head would share with the embeddings are there if it does not."""
    if HEAD in layout.config.token_indices and HEAD not in layout.with_part(TOKENS) and not base.tied_embeddings:
        raise InvalidAdapter(
            f"{CONFIG_NAME} trains tokens of lm_head, but the file holds no rows for them.", code="tensors_missing"
        )


def _check_lora_beside_tokens(layout: AdapterLayout, base: BaseShape) -> None:
    """What a matrix with both would compute depends on which of the two peft wraps around the other."""
    trained = set(layout.with_part(TOKENS))
    if base.tied_embeddings and EMBED in trained:
        trained.add(HEAD)
    if both := sorted(trained & set(layout.modules)):
        raise UnsupportedAdapter(
            f"{module_path(*both[0])} has both LoRA and trained tokens; train one of the two.", code="lora_and_tokens"
        )


def _vocab(layout: AdapterLayout, module: ModuleKey, base: BaseShape) -> int:
    """Rows of the embeddings or the head as this adapter has them."""
    own = layout.info(module, WEIGHT)
    if own is None and module == HEAD and base.tied_embeddings and not layout.config.saves(EMBED):
        own = layout.info(EMBED, WEIGHT)
    return own.shape[0] if own is not None and own.shape else base.vocab_size


def _linear_shape(layout: AdapterLayout, module: ModuleKey, base: BaseShape) -> tuple[int, int]:
    """(N, K) of a module that LoRA changes. Raises: WrongBase if there is none."""
    layer, name = module
    if module == EMBED:
        return base.hidden_size, _vocab(layout, module, base)
    if module == HEAD:
        return _vocab(layout, module, base), base.hidden_size
    parts = FUSED_LINEARS.get(name, (name,))
    if layer >= base.num_layers or any(part not in base.linears for part in parts):
        raise WrongBase(
            f"The adapter changes {module_path(*module)}, but the base has {base.num_layers} layers with "
            f"{', '.join(base.linears)}: it was made for another base.",
            code="module_not_in_base",
        )
    return sum(base.linears[part][0] for part in parts), base.linears[parts[0]][1]


def _check_weight(layout: AdapterLayout, module: ModuleKey, base: BaseShape) -> None:
    """A whole trained weight: a norm's, or the embeddings' or the head's with any number of rows."""
    shape = layout.tensors[module, WEIGHT][1].shape
    wanted: tuple[int, ...]
    if module in (EMBED, HEAD):
        wanted = (shape[0] if len(shape) == 2 else base.vocab_size, base.hidden_size)
    else:
        size = base.norm_size(module)
        if not size:
            raise WrongBase(
                f"The adapter holds {module_path(*module)}, which the base does not have.", code="module_not_in_base"
            )
        wanted = (size,)
    if shape != wanted or 0 in shape:
        raise WrongBase(
            f"The adapter's weight of {module_path(*module)} has shape {list(shape)}; {list(wanted)} is needed.",
            code="shape_mismatch",
        )


def _check_tokens(layout: AdapterLayout, module: ModuleKey, base: BaseShape) -> None:
    shape = layout.tensors[module, TOKENS][1].shape
    if shape[1] != base.hidden_size:
        raise WrongBase(
            f"The adapter's trained tokens of {module_path(*module)} have {shape[1]} values each, the base's have "
            f"{base.hidden_size}.",
            code="shape_mismatch",
        )
    if module not in layout.config.token_indices and not base.tied_embeddings:
        raise InvalidAdapter(
            f"The file holds trained tokens of {module_path(*module)}, but trainable_token_indices names only the embeddings', "
            "and the base does not share their rows.",
            code="not_targeted",
        )
    vocab = _vocab(layout, module, base)
    if max(layout.tokens_of(module)) >= vocab:
        raise WrongBase(
            f"{CONFIG_NAME} trains token {max(layout.tokens_of(module))} of {module_path(*module)}, which has "
            f"{vocab} rows. Save the adapter with save_embedding_layers=True if the vocabulary was enlarged.",
            code="token_not_in_base",
        )


def _check_biases(layout: AdapterLayout, base: BaseShape) -> None:
    present = layout.with_part(BIAS)
    for module in present:
        layer, name = module
        parts = FUSED_LINEARS.get(name, (name,))
        if layer >= base.num_layers or any(part not in base.biases for part in parts):
            raise WrongBase(
                f"The adapter holds a bias of {module_path(*module)}, which has none in the base.",
                code="module_not_in_base",
            )
        size = sum(base.linears[part][0] for part in parts)
        if layout.tensors[module, BIAS][1].shape != (size,):
            raise WrongBase(f"The adapter's bias of {module_path(*module)} is not [{size}].", code="shape_mismatch")
    if layout.config.bias == "none":
        return
    covered = {(layer, part) for layer, name in present for part in FUSED_LINEARS.get(name, (name,))}
    trained = {(layer, part) for layer, name in layout.modules for part in FUSED_LINEARS.get(name, (name,))}
    every = {(layer, name) for layer in range(base.num_layers) for name in LINEARS}
    wanted = {module for module in (every if layout.config.bias == "all" else trained) if module[1] in base.biases}
    if lost := sorted(wanted - covered):
        raise InvalidAdapter(
            f"{CONFIG_NAME} says bias={layout.config.bias!r}, but the file does not hold the trained bias of "
            f"{module_path(*lost[0])} (older versions of peft lose them when they save).",
            code="tensors_missing",
        )


def _check_targets(layout: AdapterLayout, base: BaseShape) -> None:
    targets = layout.config.targets(base)
    if targets is None:
        return
    present = set(layout.modules)
    if base.tied_embeddings and layout.config.ensure_weight_tying:
        present, targets = present - {EMBED, HEAD}, targets - {EMBED, HEAD}
    if extra := sorted(present - targets):
        raise InvalidAdapter(
            f"The file holds factors for {module_path(*extra[0])}, which {CONFIG_NAME} does not target.",
            code="not_targeted",
        )
    if lost := sorted(targets - present):
        raise InvalidAdapter(
            f"{CONFIG_NAME} targets {module_path(*lost[0])}, but the file holds no factors for it "
            f"({len(lost)} linears in all). If that is meant, name in target_modules and layers_to_transform only what "
            "the file holds.",
            code="tensors_missing",
        )

"""The manifest that the store keeps with each adapter, and the digest that identifies its content."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loraplex_adapters.base import BaseShape, module_path
from loraplex_adapters.errors import InvalidAdapter, WrongBase
from loraplex_adapters.header import TensorInfo
from loraplex_adapters.layout import WEIGHTS_NAME, AdapterLayout, read_layout
from loraplex_adapters.tensor_names import TOKENS, A, B

MANIFEST_NAME = "loraplex_adapter.json"
_MAX_MANIFEST_BYTES = 1 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """Facts about one stored adapter.

    ``digest`` is 64 hex characters. ``ranks`` maps each targeted linear's name to its highest rank over the layers.
    ``num_bytes`` counts the tensors as stored. ``created_at`` is Unix time in seconds. ``features``: what it does beyond
    plain LoRA, see ``AdapterLayout.features``.
    """

    digest: str
    base_fingerprint: str
    base_model_name: str | None
    min_rank: int
    max_rank: int
    ranks: Mapping[str, int]
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    num_layers: int
    num_parameters: int
    num_bytes: int
    created_at: float
    source: str | None
    features: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises InvalidAdapter if ``text`` is no manifest."""
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(
                **{
                    **fields,
                    "target_modules": tuple(fields["target_modules"]),
                    "features": tuple(fields.get("features", ())),
                }
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InvalidAdapter(f"{MANIFEST_NAME} is not a manifest.", code="manifest_invalid") from None


def digest_of(directory: Path, layout: AdapterLayout | None = None) -> str:
    """SHA-256 over what the adapter computes: each module's scaling, its tensors' dtypes, shapes and bytes, and tokens.

    The order of tensors, metadata, their spelling of names and config keys without effect do not change it.
    """
    layout = layout or read_layout(directory)
    digest = hashlib.sha256(b"loraplex adapter 1\n")
    with (directory / WEIGHTS_NAME).open("rb") as file:
        for module in layout.modules:
            digest.update(f"{module_path(*module)} {layout.scalings[module].hex()}\n".encode())
            for part in (A, B):
                _add_tensor(digest, file, part, layout.tensors[module, part][1])
        for module, part in sorted(key for key in layout.tensors if key[1] not in (A, B)):
            tokens = layout.tokens_of(module) if part == TOKENS else ()
            digest.update(f"{module_path(*module)} {part} {tokens}\n".encode())
            _add_tensor(digest, file, part, layout.tensors[module, part][1])
    if not layout.is_plain:
        config = layout.config
        saves = sorted(module_path(*module) for module, _ in layout.tensors if config.saves(module))
        digest.update(f"tying {config.ensure_weight_tying} saves {saves}\n".encode())
    return digest.hexdigest()


def _add_tensor(digest: "hashlib._Hash", file: BinaryIO, part: str, info: TensorInfo) -> None:
    digest.update(f"{part} {info.dtype} {info.shape}\n".encode())
    file.seek(info.begin)
    left = info.end - info.begin
    while left:
        chunk = file.read(min(left, _READ_BYTES))
        if not chunk:
            raise InvalidAdapter(f"{WEIGHTS_NAME} became shorter while it was read.", code="weights_broken")
        digest.update(chunk)
        left -= len(chunk)


def make_manifest(layout: AdapterLayout, digest: str, base: BaseShape, source: str | None) -> Manifest:
    """The manifest of a checked directory, created now."""
    ranks: dict[str, int] = {}
    for module in layout.modules:
        ranks[module[1]] = max(ranks.get(module[1], 0), layout.rank(module))
    ranks_of = [layout.rank(module) for module in layout.modules]
    infos = [info for _, info in layout.tensors.values()]
    return Manifest(
        digest=digest,
        base_fingerprint=base.fingerprint,
        base_model_name=layout.config.base_model_name,
        min_rank=min(ranks_of, default=0),
        max_rank=max(ranks_of, default=0),
        ranks=ranks,
        alpha=layout.config.alpha,
        use_rslora=layout.config.use_rslora,
        target_modules=tuple(ranks),
        num_layers=len({layer for layer, _ in layout.modules if layer >= 0}),
        num_parameters=sum(math.prod(info.shape) for info in infos),
        num_bytes=sum(info.end - info.begin for info in infos),
        created_at=time.time(),
        source=source,
        features=layout.features,
    )


def check_uploaded_manifest(directory: Path, base: BaseShape) -> None:
    """If the directory carries a manifest, raise WrongBase unless it names this base."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return
    with path.open("rb") as file:
        raw = file.read(_MAX_MANIFEST_BYTES)
    manifest = Manifest.from_json(raw.decode("utf-8", errors="replace"))
    if manifest.base_fingerprint != base.fingerprint:
        raise WrongBase(
            f"{MANIFEST_NAME} says that the adapter was made for base {str(manifest.base_fingerprint)[:16]}, "
            f"this server's base is {base.fingerprint[:16]}. Delete that file if you are sure that it fits."
        )

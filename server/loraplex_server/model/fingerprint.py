"""The identity of a base model, by which adapters and caches know what they belong to."""

import hashlib

from loraplex_server.model.checkpoint import Checkpoint
from loraplex_server.model.spec import ModelSpec


def fingerprint(spec: ModelSpec, checkpoint: Checkpoint | None) -> str:
    """sha256 over what the config computes (``maths_digest``) and what the checkpoint holds (``content_digest``).

    Equal for equal files wherever they lie; a dummy model (``checkpoint`` None) is identified by its config alone.
    """
    content = "dummy" if checkpoint is None else checkpoint.content_digest()
    return hashlib.sha256(f"{spec.maths_digest()} {content}".encode()).hexdigest()

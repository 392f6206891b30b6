"""Adapters from the Hugging Face Hub: the adapter's own files of one commit, nothing else."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapters.errors import AdapterTooLarge, InvalidAdapter, SourceRefused, SourceUnavailable
from loraplex_adapters.format import WEIGHTS_NAME, refuse_other_weights
from loraplex_adapters.lora_config import CONFIG_NAME

SCHEME = "hf://"

_TIMEOUT_S = 30.0
_WANTED = (CONFIG_NAME, WEIGHTS_NAME, "README.md")
_SOURCE = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}))?"
)


class Hub:
    """The Hub at ``endpoint`` (None: the public one), read with ``token`` and no other of this machine's tokens."""

    def __init__(self, token: str | None = None, endpoint: str | None = None) -> None:
        self._token = token or False
        self._endpoint = endpoint

    def fetch(self, source: str, into: Path, max_bytes: int) -> str:
        """Download ``hf://org/repo[@revision]`` into ``into``; the source pinned to its commit.

        Raises: SourceRefused (malformed), SourceUnavailable, AdapterTooLarge, InvalidAdapter (no adapter there).
        """
        found = _SOURCE.fullmatch(source)
        if found is None or ".." in source:
            raise SourceRefused(f"{source[:200]!r} is not of the form hf://org/repo or hf://org/repo@revision.")
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token)
        repo = found["repo"]
        with _failures(source):
            info = api.model_info(repo, revision=found["revision"], files_metadata=True, timeout=_TIMEOUT_S)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        _check_listing(source, sizes, max_bytes)
        for name in _WANTED:
            if name in sizes:
                with _failures(source):
                    api.hf_hub_download(repo, name, revision=info.sha, local_dir=into)
        shutil.rmtree(into / ".cache", ignore_errors=True)
        _check_size(source, sum((into / name).stat().st_size for name in _WANTED if name in sizes), max_bytes)
        return f"{SCHEME}{repo}@{info.sha}"


def _check_listing(source: str, sizes: dict[str, int | None], max_bytes: int) -> None:
    if CONFIG_NAME not in sizes:
        raise InvalidAdapter(f"{source} has no {CONFIG_NAME}: it is no adapter.", code="adapter_config_missing")
    refuse_other_weights(sorted(sizes))
    _check_size(source, sum(sizes[name] or 0 for name in _WANTED if name in sizes), max_bytes)


def _check_size(source: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise AdapterTooLarge(f"{source} has {num_bytes} bytes; at most {max_bytes} are allowed here.")


@contextmanager
def _failures(source: str) -> Iterator[None]:
    """Say in our words what kept the Hub from delivering."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceUnavailable(f"{source} is gated; accept its terms and give this server a Hub token.") from error
    except errors.RevisionNotFoundError as error:
        raise SourceUnavailable(f"{source}: the Hub has no such revision.", code="source_not_found") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceUnavailable(
            f"{source}: the Hub has no such repository, or it is private and this server's token does not open it.",
            code="source_not_found",
        ) from error
    except Exception as error:  # the library's own, its HTTP client's (which changes with its version), bad answers
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SourceUnavailable(f"{source}: the Hub did not deliver ({type(error).__name__}); try again.") from error

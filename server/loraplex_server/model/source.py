"""Where a model's files are: a local folder, or a Hub repository brought into the local cache."""

from pathlib import Path
from typing import Final

from loraplex_server.model.errors import ModelNotFound

# Nothing that can hold code or pickled objects is ever asked for.
_CONFIG_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_WEIGHT_FILES: Final = ("*.safetensors", "model.safetensors.index.json")


def resolve(model: str | Path, *, revision: str | None = None, token: str | None = None, weights: bool = True) -> Path:
    """The folder of ``model``: itself if it is a folder, else the Hub snapshot, downloaded if need be.

    ``weights`` False leaves the tensors out. Raises: ModelNotFound.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model, Path) or folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
        raise ModelNotFound(f"{model} is neither a folder nor a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_CONFIG_FILES, *(_WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(str(model), revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelNotFound(f"the Hub gives no {model}{at}: {error}") from error

"""The one tree of errors that adapters raise on a user's mistake; servers map each class to one status."""

from typing import ClassVar


class AdapterError(Exception):
    """Base of every error about adapters.

    ``code`` is a stable snake_case word for programs; the message is for people and names the thing, the limit and
    the way out.
    """

    default_code: ClassVar[str] = "adapter_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code


class InvalidAdapter(AdapterError):
    """What was handed over is no adapter that can be served (422)."""

    default_code = "adapter_invalid"


class UnsupportedAdapter(InvalidAdapter):
    """A valid adapter of a kind that is not served; the message names the feature (422)."""

    default_code = "adapter_unsupported"


class WrongBase(InvalidAdapter):
    """The adapter was made for another base model (422)."""

    default_code = "wrong_base"


class AdapterTooLarge(AdapterError):
    """More bytes or files than allowed (413)."""

    default_code = "adapter_too_large"


class AdapterNotFound(AdapterError):
    """No adapter, version or digest answers to that name (404)."""

    default_code = "adapter_not_found"


class AdapterNameTaken(AdapterError):
    """The name already stands for something else (409)."""

    default_code = "adapter_name_taken"


class AdapterPinned(AdapterError):
    """The adapter is pinned and must be unpinned first (409)."""

    default_code = "adapter_pinned"


class SourceRefused(AdapterError):
    """The source is of a kind, or at a place, that is not allowed (403)."""

    default_code = "source_refused"


class SourceUnavailable(AdapterError):
    """The Hub did not deliver (502)."""

    default_code = "source_unavailable"


class StoreFull(AdapterError):
    """The disk below the store has no room left (507)."""

    default_code = "store_full"

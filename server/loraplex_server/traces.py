"""Where in the code an error comes from, without its words: they may quote a prompt."""

import traceback

_MOST_PLACES = 8


def where_of(error: BaseException) -> list[str]:
    """The last places in the code that an exception went through."""
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_PLACES:]
    return [f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}" for frame in frames]

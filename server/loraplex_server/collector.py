"""Keeps the garbage collector's pauses out of serving.

Start-up leaves a million objects that live as long as the process does. Looking through all of them takes a few hundred
milliseconds, in which no token moves, and the collector does it again and again as requests come and go.
"""

import gc

# Young objects between two collections. A request makes a few thousand and nearly all go without the collector.
_YOUNG_OBJECTS = 20_000


def spare_what_is_there() -> None:
    """Collect once, then never look again at what is left. To be called when a process is ready for its work."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])

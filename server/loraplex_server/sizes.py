"""Byte sizes as people write them: 512MiB, 2g, 1.5 GB."""

import re

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)(B?)\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes. K, M, G, T alone and KiB to TiB count in 1024s, KB to TB in 1000s.

    Raises: ValueError, saying what a size looks like.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text[:40]!r} is not a size; write it as 512MiB, 2GiB or a number of bytes")
    number, prefix, binary, byte = match.groups()
    unit = 1000 if byte and prefix and not binary else 1024
    return int(float(number) * unit ** _POWERS[prefix.lower()])

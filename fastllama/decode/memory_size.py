"""Sizes of memory as people write them."""

import re
from numbers import Integral

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(given, name: str = "memory") -> int:
    """Bytes of "24GB", "16GiB", "500 MB" or a whole number of bytes. `ValueError` names `name` and its value."""
    found = _SIZE.fullmatch(given) if isinstance(given, str) else None
    if isinstance(given, Integral) and not isinstance(given, bool):
        nbytes = int(given)
    elif found is not None and found[2].upper() in _UNITS:
        nbytes = int(float(found[1]) * _UNITS[found[2].upper()])
    else:
        nbytes = 0
    if nbytes < 1:
        raise ValueError(f"{name}={given!r} is not allowed; allowed: a size such as 24GB, 16GiB, 500MB, or bytes")
    return nbytes

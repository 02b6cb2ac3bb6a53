"""Seeds by name: everything random comes from a study's seed, a number and a name."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: int | str) -> int:
    """A 63-bit seed that depends on ``seed`` and on every one of ``names``, in order.

    Independent of the process, the platform and ``PYTHONHASHSEED``.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

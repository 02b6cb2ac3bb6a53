"""Seeds derived by name: every random draw depends on a study's seed, a number and a name, never on global state."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: int | str) -> int:
    """Derive a 63-bit seed from ``seed`` and ``names``, whose order matters.

    The result does not depend on the process, the platform or ``PYTHONHASHSEED``.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

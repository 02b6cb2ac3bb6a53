"""Benchmark of the cache's checksum: processor time to open an entry and read it once, with and without it.

Entries come from memory; reads with and without the checksum take turns.

    python -m benchmarks.cache
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import torch

from archsearch.machine import chip
from snapgen.io import cache

SIZES = (1 << 20, 1 << 24, 1 << 28)
REPEATS = 15


def read(size: int) -> float:
    """Processor seconds to open an entry of float16 latents, and to sum it as a training would touch it."""
    begun = time.process_time()
    tensors = cache.cached_tensors("latents", {"size": size}, lambda: {"latents": torch.rand(size // 2).half()})
    tensors["latents"].sum(dtype=torch.float32)
    return time.process_time() - begun


def compare(size: int) -> tuple[float, float]:
    """Median seconds of a read without the checksum, and with it."""
    checksum, stored = cache.checksum, ""
    read(size)

    def remember(tensors: dict[str, torch.Tensor]) -> str:
        nonlocal stored
        stored = checksum(tensors)
        return stored

    without, checked = [], []
    for _ in range(REPEATS):
        cache.checksum = remember  # type: ignore[assignment]
        checked.append(read(size))
        cache.checksum = lambda _: stored  # type: ignore[assignment]
        without.append(read(size))
    cache.checksum = checksum
    return statistics.median(without), statistics.median(checked)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{chip()}, zlib {zlib.ZLIB_RUNTIME_VERSION}, one thread, medians of {REPEATS}\n")
    print("| entry | without ms | with ms | GB/s of the check |\n|---:|---:|---:|---:|")
    for size in SIZES:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            os.environ["ARCHSEARCH_CACHE"] = folder
            without, checked = compare(size)
        rate = size / (checked - without) / 1e9
        print(f"| {size >> 20} MiB | {1e3 * without:.1f} | {1e3 * checked:.1f} | {rate:.1f} |")


if __name__ == "__main__":
    main()

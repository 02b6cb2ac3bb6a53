"""Benchmark of a separable convolution's depthwise part in training: `Depthwise` against ``nn.Conv2d``, side by side.

Batches of 64, forward and backward, channels last; CPU time of the one thread. The two take turns, and ratios are taken
within a turn. Without AVX-512, maps of 2×2 pixels are the case that the layer is for; elsewhere both are the same.

    OMP_NUM_THREADS=1 python -m benchmarks.depthwise

Results: ``reports/results/step_time.md``.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from snapgen.models.onednn import Depthwise

BATCH, CHANNELS, SIDES = 64, (128, 256, 512), (2, 3, 4, 8)
TURNS, REPEATS = 9, 5


def milliseconds(layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> float:
    """CPU time of one forward and backward pass, the mean of `REPEATS`."""
    start = time.process_time()
    for _ in range(REPEATS):
        torch.autograd.grad(layer(x), (x, layer.weight), gradient)
    return (time.process_time() - start) / REPEATS * 1e3


def main() -> None:
    """Print one row per number of channels and side of the map."""
    torch.set_num_threads(1)
    print("instruction set:", torch.backends.cpu.get_cpu_capability())
    print("| channels | map | nn.Conv2d, ms | Depthwise, ms | ratio | quartiles |\n|---|---|---|---|---|---|")
    for channels in CHANNELS:
        for side in SIDES:
            layer = Depthwise(channels)
            plain = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
            plain.load_state_dict(layer.state_dict())
            x = torch.randn(BATCH, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
            gradient = torch.randn_like(x)
            turns = [(milliseconds(plain, x, gradient), milliseconds(layer, x, gradient)) for _ in range(TURNS + 1)]
            pairs = turns[1:]  # the first turn warms up
            before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
            low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            print(
                f"| {channels} | {side}×{side} | {before:.2f} | {after:.2f} | {ratio:.2f} | {low:.2f} to {high:.2f} |"
            )


if __name__ == "__main__":
    main()

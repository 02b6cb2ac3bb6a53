"""Tensors of many rows in parts: computed part by part, each kept in a file of its own and read where it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from snapgen.io.cache import JSON, cached_tensors

LARGEST_ROWS = 8192
LARGEST_BYTES = 1 << 28


class ChunkedTensor:
    """A tensor ``(N, …)`` in chunks of its rows, which may be memory-mapped: indexing reads only the rows it names.

    Args:
        chunks: at least one; alike in all but their first axis.
    """

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        assert chunks, "an empty set is one chunk of no rows"
        first = chunks[0]
        assert all((c.shape[1:], c.dtype, c.device) == (first.shape[1:], first.dtype, first.device) for c in chunks)
        self._chunks = list(chunks)
        self._ends = torch.tensor([len(chunk) for chunk in chunks]).cumsum(0)
        self.shape = torch.Size([int(self._ends[-1]), *first.shape[1:]])
        self.dtype, self.device = first.dtype, first.device

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The rows (B, …) of so many indices (int64, from 0), a copy on the rows' device.

        Raises:
            IndexError: if there is no such row.
        """
        if len(self._chunks) == 1:
            return self._chunks[0][indices]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"rows are 0 to {len(self) - 1}")
        out = torch.empty(len(indices), *self.shape[1:], dtype=self.dtype, device=self.device)
        numbers = torch.bucketize(indices, self._ends, right=True)
        for number in sorted(set(numbers.tolist())):
            wanted = (numbers == number).nonzero().flatten()
            chunk = self._chunks[number]
            out[wanted] = chunk[indices[wanted] - (int(self._ends[number]) - len(chunk))]
        return out

    def whole(self, device: torch.device | None = None) -> Tensor:
        """All rows as one tensor, which shares memory with the only chunk where it can."""
        device = device or self.device
        if len(self._chunks) == 1:
            return self._chunks[0].to(device)
        out = torch.empty(self.shape, dtype=self.dtype, device=device)
        end = 0
        for chunk in self._chunks:  # one at a time: a join before the move would need the room twice
            begin, end = end, end + len(chunk)
            out[begin:end] = chunk
        return out

    def to(self, device: torch.device) -> ChunkedTensor:
        """The same on a device, whole; for sets that fit."""
        return self if device == self.device else ChunkedTensor([self.whole(device)])


def chunk_ranges(count: int, row_bytes: int, *, multiple: int = 1) -> list[range]:
    """The rows of each part: at most `LARGEST_ROWS` and `LARGEST_BYTES`, but at least ``multiple``, and a multiple of
    it in all but the last. No rows are one empty part.
    """
    most = min(LARGEST_ROWS, LARGEST_BYTES // max(1, row_bytes))
    size = max(1, most // multiple) * multiple
    return [range(start, min(start + size, count)) for start in range(0, count or 1, size)]


def cached_chunks(
    kind: str,
    ranges: Sequence[range],
    key: Callable[[range], Mapping[str, JSON]],
    compute: Callable[[range], dict[str, Tensor]],
) -> dict[str, ChunkedTensor]:
    """Tensors of many rows, computed part by part; what was computed before an interruption is not computed again.

    Args:
        kind, key, compute: as `snapgen.io.cache.cached_tensors` takes them, for the rows of one part; the parts come in
        order. ranges: as `chunk_ranges` gives them.

    Returns:
        As ``compute``, all parts as one; memory-mapped.
    """
    found = [cached_tensors(kind, key(part), lambda part=part: compute(part)) for part in ranges]  # type: ignore[misc]
    return {name: ChunkedTensor([tensors[name] for tensors in found]) for name in found[0]}

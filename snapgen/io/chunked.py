"""Tensors of many rows in chunks: computed chunk by chunk, each cached in its own file and read by memory mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from snapgen.io.cache import JSON, cached_tensors

MAX_CHUNK_ROWS = 8192
MAX_CHUNK_BYTES = 1 << 28


class ChunkedTensor:
    """Tensor ``(N, …)`` stored as chunks along its first axis; indexing reads only the requested rows.

    The chunks may be memory-mapped.

    Args:
        chunks: at least one; equal in dtype, device and all but their first axis.
    """

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        assert chunks, "represent an empty set by one chunk without rows"
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
        """Size of all rows in bytes."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Gather rows: int64 indices (B,) from 0 → a copy (B, …) on the device of the chunks.

        Raises:
            IndexError: if an index is out of range.
        """
        if len(self._chunks) == 1:
            return self._chunks[0][indices]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"rows are 0 to {len(self) - 1}")
        out = torch.empty(len(indices), *self.shape[1:], dtype=self.dtype, device=self.device)
        chunk_of_row = torch.bucketize(indices, self._ends, right=True)  # (B,)
        for number in sorted(set(chunk_of_row.tolist())):
            positions = (chunk_of_row == number).nonzero().flatten()
            chunk = self._chunks[number]
            first_row = int(self._ends[number]) - len(chunk)
            out[positions] = chunk[indices[positions] - first_row]
        return out

    def materialize(self, device: torch.device | None = None) -> Tensor:
        """All rows as one tensor; a single chunk is returned as it is if the device allows."""
        device = device or self.device
        if len(self._chunks) == 1:
            return self._chunks[0].to(device)
        out = torch.empty(self.shape, dtype=self.dtype, device=device)
        end = 0
        for chunk in self._chunks:  # chunk by chunk: torch.cat before the move would need twice the memory
            start, end = end, end + len(chunk)
            out[start:end] = chunk
        return out

    def to(self, device: torch.device) -> ChunkedTensor:
        """The same rows on another device, as one chunk; for sets that fit there."""
        return self if device == self.device else ChunkedTensor([self.materialize(device)])


def chunk_ranges(count: int, row_bytes: int, *, multiple: int = 1) -> list[range]:
    """Split ``count`` rows into chunks of at most `MAX_CHUNK_ROWS` rows and `MAX_CHUNK_BYTES` bytes.

    Args:
        count: number of rows; 0 gives one empty chunk.
        row_bytes: size of a row.
        multiple: every chunk but the last has a multiple of this number of rows, even where that exceeds the limits.

    Returns:
        The row indices of each chunk.
    """
    max_rows = min(MAX_CHUNK_ROWS, MAX_CHUNK_BYTES // max(1, row_bytes))
    size = max(1, max_rows // multiple) * multiple
    return [range(start, min(start + size, count)) for start in range(0, count or 1, size)]


def cached_chunks(
    kind: str,
    ranges: Sequence[range],
    key: Callable[[range], Mapping[str, JSON]],
    compute: Callable[[range], dict[str, Tensor]],
) -> dict[str, ChunkedTensor]:
    """Compute tensors of many rows chunk by chunk; chunks finished before an interruption come from the cache.

    Args:
        kind: as in `snapgen.io.cache.cached_tensors`.
        ranges: the rows of each chunk, from `chunk_ranges`.
        key: returns everything that the tensors of a chunk depend on.
        compute: computes the tensors of a chunk; called in the order of the chunks.

    Returns:
        The tensors of ``compute`` over all chunks, memory-mapped.
    """
    chunks = [cached_tensors(kind, key(rows), lambda rows=rows: compute(rows)) for rows in ranges]  # type: ignore[misc]
    return {name: ChunkedTensor([tensors[name] for tensors in chunks]) for name in chunks[0]}

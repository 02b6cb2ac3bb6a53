from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from snapgen.io import chunked
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_rows_are_those_of_the_full_tensor(sizes: list[int], data: st.DataObject) -> None:
    full = torch.arange(sum(sizes) * 6.0).reshape(-1, 2, 3).half()
    chunked_tensor = ChunkedTensor(torch.split(full, sizes))
    assert (len(chunked_tensor), chunked_tensor.shape, chunked_tensor.dtype) == (len(full), full.shape, full.dtype)
    assert chunked_tensor.nbytes == full.nbytes
    assert torch.equal(chunked_tensor.materialize(), full)
    if len(full):
        indices = torch.tensor(data.draw(st.lists(st.integers(0, len(full) - 1))), dtype=torch.int64)
        assert torch.equal(chunked_tensor[indices], full[indices])


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("index", [6, -7, 1000])
def test_there_is_no_such_row(chunks: int, index: int) -> None:
    chunked_tensor = ChunkedTensor(torch.zeros(6, 2).chunk(chunks))
    with pytest.raises(IndexError):
        chunked_tensor[torch.tensor([0, index])]


def test_moving_to_another_device_joins_the_chunks() -> None:
    chunked_tensor = ChunkedTensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert chunked_tensor.to(torch.device("cpu")) is chunked_tensor
    moved = chunked_tensor.to(torch.device("meta"))
    assert (moved.shape, moved.device.type) == ((3, 3), "meta")


@settings(deadline=None)
@given(count=st.integers(0, 10**6), row_bytes=st.integers(1, 10**9), multiple=st.sampled_from([1, 7, 128]))
def test_chunks_are_all_rows_in_order(count: int, row_bytes: int, multiple: int) -> None:
    ranges = chunked.chunk_ranges(count, row_bytes, multiple=multiple)
    assert (ranges[0].start, ranges[-1].stop) == (0, count)
    assert all(a.stop == b.start for a, b in itertools.pairwise(ranges))
    assert all(len(rows) % multiple == 0 for rows in ranges[:-1])
    largest = max(len(rows) for rows in ranges)
    assert largest <= multiple or (largest <= chunked.MAX_CHUNK_ROWS and largest * row_bytes <= chunked.MAX_CHUNK_BYTES)


def test_only_what_is_missing_is_computed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_CHUNK_ROWS", 4)
    seen: list[range] = []

    def key(rows: range) -> dict[str, JSON]:
        return {"first": rows.start, "rows": len(rows)}

    def compute(rows: range) -> dict[str, torch.Tensor]:
        if rows.start == fails:
            raise KeyboardInterrupt
        seen.append(rows)
        return {"a": torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, 2)}

    def load() -> ChunkedTensor:
        return chunked.cached_chunks("kind", chunked.chunk_ranges(10, 8), key, compute)["a"]

    fails = 8
    with pytest.raises(KeyboardInterrupt):
        load()
    assert seen == [range(4), range(4, 8)]
    fails, seen[:] = -1, []
    expected = torch.arange(10.0)[:, None].expand(-1, 2)
    assert torch.equal(load().materialize(), expected)
    assert seen == [range(8, 10)]
    damaged = sorted(home.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[1]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    seen.clear()
    assert torch.equal(load().materialize(), expected)
    assert seen == [range(4, 8)]


def mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is mapped from a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return inode != "0"
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of memory maps")
def test_what_was_just_computed_is_read_from_its_file_too() -> None:
    for _ in range(2):
        tensors = chunked.cached_chunks("kind", [range(4)], lambda _: {"x": 1}, lambda _: {"a": torch.ones(4, 1000)})
        assert mapped(tensors["a"].materialize())
    assert not mapped(torch.ones(4, 1000))

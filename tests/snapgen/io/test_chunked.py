from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snapgen.io import chunked
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_rows_are_the_whole_tensors(sizes: list[int], data: st.DataObject) -> None:
    whole = torch.arange(sum(sizes) * 6.0).reshape(-1, 2, 3).half()
    found = ChunkedTensor(torch.split(whole, sizes))
    assert (len(found), found.shape, found.dtype) == (len(whole), whole.shape, whole.dtype)
    assert found.nbytes == whole.nbytes
    assert torch.equal(found.whole(), whole)
    if len(whole):
        indices = torch.tensor(data.draw(st.lists(st.integers(0, len(whole) - 1))), dtype=torch.int64)
        assert torch.equal(found[indices], whole[indices])


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("index", [6, -7, 1000])
def test_there_is_no_such_row(chunks: int, index: int) -> None:
    found = ChunkedTensor(torch.zeros(6, 2).chunk(chunks))
    with pytest.raises(IndexError):
        found[torch.tensor([0, index])]


def test_another_device_holds_them_whole() -> None:
    found = ChunkedTensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert found.to(torch.device("cpu")) is found
    moved = found.to(torch.device("meta"))
    assert (moved.shape, moved.device.type) == ((3, 3), "meta")


@given(count=st.integers(0, 10**6), row_bytes=st.integers(1, 10**9), multiple=st.sampled_from([1, 7, 128]))
def test_parts_are_all_rows_in_order(count: int, row_bytes: int, multiple: int) -> None:
    found = chunked.chunk_ranges(count, row_bytes, multiple=multiple)
    assert (found[0].start, found[-1].stop) == (0, count)
    assert all(one.stop == other.start for one, other in itertools.pairwise(found))
    assert all(len(part) % multiple == 0 for part in found[:-1])
    most = max(len(part) for part in found)
    assert most <= multiple or (most <= chunked.LARGEST_ROWS and most * row_bytes <= chunked.LARGEST_BYTES)


def test_only_what_is_missing_is_computed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LARGEST_ROWS", 4)
    seen: list[range] = []

    def key(part: range) -> dict[str, JSON]:
        return {"first": part.start, "rows": len(part)}

    def compute(part: range) -> dict[str, torch.Tensor]:
        if part.start == fails:
            raise KeyboardInterrupt
        seen.append(part)
        return {"a": torch.tensor(part, dtype=torch.float32)[:, None].expand(-1, 2)}

    def ask() -> ChunkedTensor:
        return chunked.cached_chunks("kind", chunked.chunk_ranges(10, 8), key, compute)["a"]

    fails = 8
    with pytest.raises(KeyboardInterrupt):
        ask()
    assert seen == [range(4), range(4, 8)]
    fails, seen[:] = -1, []
    expected = torch.arange(10.0)[:, None].expand(-1, 2)
    assert torch.equal(ask().whole(), expected)
    assert seen == [range(8, 10)]
    damaged = sorted(home.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[1]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    seen.clear()
    assert torch.equal(ask().whole(), expected)
    assert seen == [range(4, 8)]


def mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a file's pages."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return inode != "0"
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of memory maps")
def test_what_was_just_computed_is_read_from_its_file_too() -> None:
    for _ in range(2):
        found = chunked.cached_chunks("kind", [range(4)], lambda _: {"x": 1}, lambda _: {"a": torch.ones(4, 1000)})["a"]
        assert mapped(found.whole())
    assert not mapped(torch.ones(4, 1000))

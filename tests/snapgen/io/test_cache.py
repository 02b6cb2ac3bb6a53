from __future__ import annotations

import json
import logging
import math
import os
import random
import stat
import struct
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from snapgen.errors import InputError
from snapgen.io import cache


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def test_the_second_call_reads_what_the_first_computed(home: Path) -> None:
    compute = Counted()
    first = cache.cached_tensors("kind", {"x": 1, "y": [1, "é"]}, compute)
    second = cache.cached_tensors("kind", {"y": [1, "é"], "x": 1}, compute)
    assert compute.calls == 1
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in "ab")
    [path] = files(home)
    assert path.parent == home / "kind"
    assert path.suffix == ".safetensors"
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["key"]) == {"x": 1, "y": [1, "é"]}


def test_another_key_or_kind_is_another_file(home: Path) -> None:
    compute = Counted()
    for kind, key in (("k", {"x": 1}), ("k", {"x": 2}), ("k", {"x": "1"}), ("l", {"x": 1})):
        cache.cached_tensors(kind, key, compute)
    assert compute.calls == len(files(home)) == 4


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_file_cut_short_is_computed_again(home: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    compute = Counted()
    cache.cached_tensors("kind", {"x": 1}, compute)
    [path] = files(home)
    path.write_bytes(path.read_bytes()[:keep])
    with caplog.at_level(logging.WARNING):
        again = cache.cached_tensors("kind", {"x": 1}, compute)
    assert compute.calls == 2
    assert torch.equal(again["a"], Counted()()["a"])
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert cache.cached_tensors("kind", {"x": 1}, compute).keys() == again.keys()
    assert compute.calls == 2


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(40, 3, generator=generator),
        "half": torch.randn(9, generator=generator).bfloat16(),
        "readable": torch.tensor([True, False, True]),
        "facts": torch.frombuffer(bytearray(b'{"captions": ["a fox"]}'), dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }


DAMAGES: dict[str, Callable[[random.Random, bytearray], bytes]] = {
    "bit": lambda rng, old: bytes([old[0] ^ 1 << rng.randrange(8)]),
    "byte": lambda rng, old: bytes([old[0] ^ rng.randrange(1, 256)]),
    "zeros": lambda _, old: bytes(len(old)),
    "NaN": lambda _, __: struct.pack("<f", math.nan),
}
"""New content of a place of a file, made from the 16 bytes there."""


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("seed", range(12))
def test_every_damage_is_noticed(home: Path, kind: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Damages that disks and programs make, in the header and in the data."""
    cache.cached_tensors("kind", {"x": 1}, mixed)
    [path] = files(home)
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    start = rng.randrange(len(content) - 16)
    new = DAMAGES[kind](rng, content[start : start + 16])
    assert content[start : start + len(new)] != new
    content[start : start + len(new)] = new
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = cache.cached_tensors("kind", {"x": 1}, mixed)
    assert len(caplog.records) == 1, "computed again"
    assert all(torch.equal(again[key], tensor) for key, tensor in mixed().items())
    cache.cached_tensors("kind", {"x": 1}, mixed)
    assert len(caplog.records) == 1, "made anew"


def test_every_bit_of_a_file_counts(home: Path) -> None:
    cache.cached_tensors("kind", {"x": 1}, Counted())
    [path] = files(home)
    whole = path.read_bytes()
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        tensors = cache._read(path, '{"x":1}')
        assert tensors is None or all(torch.equal(tensors[key], value) for key, value in Counted()().items()), at


def test_a_file_of_another_key_is_not_believed(home: Path) -> None:
    compute = Counted()
    cache.cached_tensors("kind", {"x": 1}, compute)
    [one] = files(home)
    cache.cached_tensors("kind", {"x": 2}, compute)
    [two] = set(files(home)) - {one}
    one.replace(two)
    cache.cached_tensors("kind", {"x": 2}, compute)
    assert compute.calls == 3


def test_a_failing_computation_leaves_no_file(home: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.cached_tensors("kind", {"x": 1}, fail)
    assert not home.exists() or not files(home)


def test_views_of_one_storage_and_views_with_strides_are_kept(home: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    for _ in range(2):
        got = cache.cached_tensors("kind", {"x": 1}, lambda: {"a": base, "b": base, "t": base.T})
        assert torch.equal(got["b"], base)
        assert torch.equal(got["t"], base.T)
    assert len(files(home)) == 1


def test_only_files_set_aside_long_ago_are_removed(home: Path) -> None:
    (home / "kind").mkdir(parents=True)
    old, new = home / "kind" / "a.1-x.part", home / "kind" / "b.2-y.part"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    cache.cached_tensors("kind", {"x": 1}, Counted())
    assert new.exists()
    assert not old.exists()


def test_a_cache_that_is_a_file_is_refused(home: Path) -> None:
    home.touch()
    with pytest.raises(InputError, match="ARCHSEARCH_CACHE"):
        cache.cached_tensors("kind", {"x": 1}, Counted())


def test_what_cannot_be_written_is_returned_with_one_warning(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    compute = Counted()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(cache.cached_tensors("kind", {"x": 1}, compute)["b"], torch.ones(2, dtype=torch.float16))
    assert compute.calls == 3
    assert len(caplog.records) == 1
    assert not files(home)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_still_answers(home: Path) -> None:
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert cache.cached_tensors("kind", {"x": 1}, Counted())["a"].shape == (2, 3)


def fill(number: int) -> float:
    big = cache.cached_tensors("kind", {"x": 1}, lambda: {"a": torch.full((500_000,), 3.0)})
    return float(big["a"].mean()) + 0 * number


def test_writers_at_the_same_time_leave_one_whole_file(home: Path) -> None:
    # Not forked: the threads that earlier tests started in torch would leave their locks shut in the child.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(fill, range(6))) == [3.0] * 6
    assert len(files(home)) == 1
    assert fill(0) == 3.0

"""Members of shards are counted, not groups, and what cannot be used is told by its cause."""

from __future__ import annotations

import gzip
import io
import json
import random
import resource
import tarfile
from pathlib import Path

import pytest

from snapgen.data.dataset import ImageDataset
from snapgen.errors import InputError
from tests.snapgen.data.pictures import picture, shard, train


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))


def read(root: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> ImageDataset:
    shard(root / "train" / "a.tar", files)
    shard(root / "val" / "a.tar", {"v.png": picture(99), "v.txt": b"v"})
    return train(root)


def captioned(*names: str) -> dict[str, bytes]:
    return {
        member: content
        for i, name in enumerate(names)
        for member, content in ((f"{name}.png", picture(i)), (f"{name}.txt", f"of {name}".encode()))
    }


def packed(path: Path, *members: tuple[tarfile.TarInfo, int]) -> Path:
    """A tar.gz of zeros, of that many bytes a member."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for info, size in members:
            info.size = size
            file.write(info.tobuf())
            for start in range(0, size, 1 << 24):
                file.write(bytes(min(1 << 24, size - start)))
            file.write(bytes(-size % 512))
        file.write(bytes(1024))
    return path


def long_name() -> tarfile.TarInfo:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    return info


@pytest.mark.parametrize(
    ("info", "place"),
    [(tarfile.TarInfo("big.png"), "big.png"), (tarfile.TarInfo("big.txt"), "big.txt"), (long_name(), "a.png")],
)
def test_what_unpacks_to_gigabytes_is_refused(tmp_path: Path, info: tarfile.TarInfo, place: str) -> None:
    path = packed(tmp_path / "a.tar.gz", (tarfile.TarInfo("a.png"), 10), (info, 600_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=rf"a\.tar\.gz: from {place} on: unpacks to more than 100 times its size"):
        train(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_sparse_member_is_named(tmp_path: Path) -> None:
    """A hole of a file takes no place in the archive, and would take as much memory as it claims."""
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": "a.png",
        "GNU.sparse.realsize": str(1 << 33),
        "GNU.sparse.map": f"{(1 << 33) - 1},1",
    }
    info.size = 1
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x"))
        caption = tarfile.TarInfo("a.txt")
        caption.size = 1
        tar.addfile(caption, io.BytesIO(b"a"))
    with pytest.raises(
        InputError, match=r"1 are empty, larger than 256 MiB, or cannot be opened, e\.g\. a\.png in a\.tar"
    ):
        train(tmp_path / "a.tar")


def test_names_with_dots_stay_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("v1.0_001", "v1.0_002", "v1.1_001", "a/b.c/d.e")
    images = read(tmp_path, captioned(*names))
    assert images.captions == [f"of {name}" for name in names]
    assert not caplog.records


def test_captions_may_stand_anywhere_in_a_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = list(captioned(*map(str, range(20))).items())
    random.Random(0).shuffle(members)
    images = read(tmp_path, members)
    order = [name.removesuffix(".png") for name, _ in members if name.endswith(".png")]
    assert images.captions == [f"of {name}" for name in order]
    assert not caplog.records


def test_captions_after_all_pictures_belong_to_them(tmp_path: Path) -> None:
    members = sorted(captioned(*map(str, range(9))).items(), key=lambda member: member[0].endswith(".txt"))
    assert read(tmp_path, members).captions == [f"of {i}" for i in range(9)]


def test_a_member_that_is_there_twice_is_told_and_the_last_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("a.png", picture(0)), ("a.txt", b"old"), ("b.png", picture(1)), ("b.txt", b"b")]
    images = read(tmp_path, [*members, ("a.png", picture(7)), ("a.txt", b"new")])
    assert images.captions == ["b", "new"]
    assert "1 are there twice, of which the last counts, e.g. a.png in a.tar" in caplog.text
    assert "truncated" not in caplog.text
    alone = train(shard(tmp_path / "train-1.tar", {"a.png": picture(7), "a.txt": b"new"}))
    assert (images.pixels[1] == alone.pixels[0]).all()


def test_what_programs_leave_is_no_member(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ghosts = {"._a.png": b"ghost", "./._a.txt": b"ghost", "__MACOSX/a.png": b"", "x/@eaDir/a.png/T.png": picture(3)}
    assert read(tmp_path, {**captioned("a"), **ghosts}).captions == ["of a"]
    assert not caplog.records


def test_each_cause_is_counted_with_an_example(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        **captioned("fine", "also.fine"),
        "bare.png": picture(2),
        "too.bare.png": picture(3),
        "broken.png": picture(4)[:-60],
        "broken.txt": b"broken",
        "empty.jpg": b"",
        "empty.txt": b"empty",
        "latin.png": picture(5),
        "latin.txt": "Käuzchen".encode("cp1252"),
        "orphan.txt": b"whose?",
        "phone.heic": b"\0" * 100,
        "phone.txt": b"a phone's",
        "0001.jpg": picture(6),
        "0001.txt": b"0001",
        "0001.seg.png": picture(7),
    }
    images = read(tmp_path, files)
    assert images.captions == ["of fine", "of also.fine", "0001"]
    assert images.skipped == 6
    for text in (
        "skipped 6 of 9 images",
        "2 have no caption (a .txt of the same name, or a .json with 'caption'), e.g. bare.png in a.tar",
        "1 are damaged, e.g. broken.png in a.tar",
        "1 are empty, larger than 256 MiB, or cannot be opened, e.g. empty.jpg",
        "1 have a caption that is not UTF-8, e.g. latin.png",
        "1 are a further image of their sample, e.g. 0001.seg.png",
        "2 are captions without an image, e.g. orphan.txt in a.tar",
        "1 are .heic, which is not read, e.g. phone.heic in a.tar",
    ):
        assert text in caplog.text


def test_a_shard_of_which_nothing_can_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of its 2 images can be used: 2 have no caption .*, e\.g\. a\.png"):
        read(tmp_path, {"a.png": picture(0), "b.png": picture(1), "captions.json": b"[]"})
    with pytest.raises(InputError, match=r"has no sample for the train split \(1 are \.heic, which is not read"):
        read(tmp_path, {"a.heic": b"0"})


@pytest.mark.parametrize("name", ["a.txt", "a.png.txt", "a.caption", "a.TXT", "a.json"])
def test_captions_of_every_name(tmp_path: Path, name: str) -> None:
    text = json.dumps({"text": "an owl"}) if name.endswith(".json") else "an owl"
    assert read(tmp_path, {name: text.encode("utf-16"), "a.png": picture(0)}).captions == ["an owl"]

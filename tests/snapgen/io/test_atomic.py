"""What is written takes its place whole or not at all, and leaves nothing behind where it fails."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from snapgen.errors import InputError
from snapgen.io.atomic import atomic_folder, atomic_write_texts, check_new_folder, check_writable


def failing(out: Path, error: BaseException, **options: bool) -> None:
    """Fail in the middle of writing a folder."""
    with atomic_folder(out, **options) as folder:
        (folder / "half").write_text("")
        raise error


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_takes_its_place_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with atomic_folder(out) as folder:
        (folder / "one").write_text("1")
        assert not out.exists()
    assert texts(tmp_path) == {"a/b/one": "1"}
    assert out.stat().st_mode & 0o777 == 0o755
    with pytest.raises(InputError, match="already exists"), atomic_folder(out):
        pass
    with atomic_folder(out, replace=True) as folder:
        (folder / "two").write_text("2")
        assert texts(out) == {"one": "1"}
    assert texts(tmp_path) == {"a/b/two": "2"}
    assert [path.name for path in out.parent.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing: I/O error: File too large"), "File too large"),
        (InputError("net", "is damaged", "mend it"), "net: is damaged; mend it"),
        (KeyboardInterrupt("stop"), "stop"),
    ],
)
def test_a_folder_that_fails_leaves_nothing(error: BaseException, reason: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(expected, match=reason):
        failing(tmp_path / "mine" / "new" / "out", error)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_what_a_killed_process_left_long_ago_goes(tmp_path: Path) -> None:
    for name, hours in {".out-abcdefgh.part": 48, ".out-abcdefg2.part": 1, ".out-original": 48}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
        os.utime(tmp_path / name, (time.time() - hours * 3600,) * 2)
    with atomic_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out-abcdefg2.part", ".out-original"}


def test_a_folder_that_is_not_replaced_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "one").write_text("1")
    with pytest.raises(InputError):
        failing(out, OSError(28, "No space left on device"), replace=True)
    assert texts(tmp_path) == {"out/one": "1"}


def test_of_files_that_belong_together_none_is_replaced_alone(tmp_path: Path) -> None:
    pages = [tmp_path / "page.html", tmp_path / "page.csv"]
    atomic_write_texts(dict.fromkeys(pages, "old"))
    pages[1].unlink()
    pages[1].mkdir()
    with pytest.raises(InputError, match=r"page.csv: cannot be written .Is a directory"):
        atomic_write_texts(dict.fromkeys(pages, "new"))
    assert texts(tmp_path) == {"page.html": "old"}


def test_what_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "new" / "image.png")
    with pytest.raises(InputError, match="already exists"):
        check_new_folder(tmp_path)
    check_new_folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

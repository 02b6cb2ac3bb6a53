from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from snapgen.coreml import convert as coreml
from snapgen.coreml.__main__ import convert, main
from snapgen.coreml.package import PackageOptions
from snapgen.errors import InputError
from tests.snapgen.coreml.test_convert import SMALL, Written, decoder


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked of the conversions, in place of which a package of no content is given."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))

    def stand_in(kind: str) -> Any:
        def give(what: Any, size: int, *_: Any, **__: Any) -> Path:
            calls.append((kind, what, size))
            folder = tmp_path / f"{kind}.mlpackage"
            if not folder.exists():
                package = Written()
                package.user_defined_metadata["archsearch"] = kind
                package.save(str(folder))
            return folder

        return give

    for kind in ("unet", "decoder", "text"):
        monkeypatch.setattr(coreml, f"convert_{kind}", stand_in(kind))
    return calls


def test_a_name_is_taken_for_what_it_is(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "decoder")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "arch.yaml").write_text(yaml.safe_dump(SMALL.model_dump(mode="json")))
    for name in ("snapgen-t2i", "arch.yaml", "decoder", "tiny-decoder", "minilm", "bert"):
        given = str(tmp_path / name) if (tmp_path / name).exists() else name
        convert(given, 32, None, PackageOptions())
    assert [(kind, size) for kind, _, size in asked] == [
        ("unet", 32),
        ("unet", 32),
        ("decoder", 32),
        ("decoder", 32),
        ("text", 16),
        ("text", 16),
    ]
    assert asked[1][1].id == SMALL.id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "nonsense"}, "nonsense: is neither a preset nor a file"),
        ({"out": Path("here")}, "--out: here is no package's name; end it in .mlpackage"),
        ({"palette_bits": 5}, "options: palette_bits"),
        ({"palette_bits": 4, "int8": True}, "choose one of the two"),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"name": "snapgen-t2i", "out": tmp_path / "it.mlpackage", "latent": 32, "tokens": None}
    given |= {"palette_bits": None, "int8": False, "quiet": True} | changes
    with pytest.raises(InputError) as caught:
        main(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it.mlpackage").exists()


def test_a_folder_that_is_no_package_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "it.mlpackage").mkdir()
    with pytest.raises(InputError, match="exists and is no package"):
        main("minilm", tmp_path / "it.mlpackage", quiet=True)


def test_a_damaged_net_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(InputError, match="cannot be read as a U-Net"):
        convert(str(tmp_path), 32, None, PackageOptions())

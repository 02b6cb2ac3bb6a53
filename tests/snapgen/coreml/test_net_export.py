"""A name is taken for what it is, and one package is written for it, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from snapgen.coreml import convert as coreml
from snapgen.coreml.net_export import export_net
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
        export_net(given, tmp_path / f"{name}.mlpackage", latent_size=32)
        assert (tmp_path / f"{name}.mlpackage" / "Manifest.json").is_file()
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
    ("name", "out", "message"),
    [
        ("nonsense", "it.mlpackage", "nonsense: is neither a preset nor a file"),
        ("minilm", "here", "--out: here is not a package's name; end it in .mlpackage"),
    ],
)
def test_a_mistake_is_one_line(
    name: str, out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        export_net(name, Path(out))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.mlpackage"))


def test_a_package_is_replaced_and_a_folder_that_is_none_is_not(tmp_path: Path) -> None:
    out = tmp_path / "it.mlpackage"
    export_net("minilm", out)
    (out / "old").touch()
    export_net("minilm", out)
    assert [file.name for file in out.iterdir()] == ["Manifest.json"]
    (tmp_path / "folder.mlpackage").mkdir()
    with pytest.raises(InputError, match="exists and is not a package"):
        export_net("minilm", tmp_path / "folder.mlpackage")


def test_a_damaged_net_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(InputError, match="has no diffusion_pytorch_model"):
        export_net(str(tmp_path), tmp_path / "it.mlpackage")

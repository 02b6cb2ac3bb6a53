"""The shipped schemas are those of the types, and every shipped file names its own and meets it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from archsearch import cli, schemas
from archsearch.library import SchemaKind, schema_path, shipped
from archsearch.schemas import TYPES
from snapgen.architecture import presets

MODELINE = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")
KINDS: dict[SchemaKind, list[Path]] = {
    "study": [path for kind in ("search", "ablation", "evolution") for path in shipped(kind).values()],
    "space": [*shipped("space").values()],
    "recipe": [*shipped("training").values()],
    "comparison": [*shipped("comparison").values()],
    "architecture": [Path(presets.__file__).parent / f"{name}.yaml" for name in presets.NAMES],
}
FILES = [pytest.param(kind, path, id=f"{kind}-{path.stem}") for kind, paths in KINDS.items() for path in paths]


class Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 and editors do, and names as text, as JSON does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("0123456789"))


def validator(kind: SchemaKind) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(schema_path(kind).read_text()))


@pytest.mark.parametrize("kind", TYPES)
def test_a_schema_is_that_of_its_type(kind: SchemaKind) -> None:
    fresh = schema_path(kind).read_text() == schemas.schema_text(kind)
    assert fresh, f"{schema_path(kind).name} is stale; run: python -m archsearch.schemas"


@pytest.mark.parametrize("kind", TYPES)
def test_a_schema_is_one(kind: SchemaKind) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas.schema(kind))


@pytest.mark.parametrize(("kind", "path"), FILES)
def test_a_shipped_file_names_its_schema_and_meets_it(kind: SchemaKind, path: Path) -> None:
    text = path.read_text()
    modeline = MODELINE.match(text)
    assert modeline, "the first line"
    source = path.resolve()  # behind the links of archsearch.library
    assert (source.parent / modeline.group(1)).resolve() == schema_path(kind).resolve()
    validator(kind).validate(yaml.load(text, Loader))  # noqa: S506 - a SafeLoader


@pytest.mark.parametrize(
    ("kind", "values", "problem"),
    [
        ("study", {"space": "emoji", "trails": 3}, "'trails' was unexpected"),
        ("study", {"space": "emoji", "objectives": ["beauty"]}, "'beauty' is not one of"),
        ("study", {"space": "emoji", "sampler": "anneal"}, "'anneal'"),
        ("space", {"base": "sd15"}, "'latent_size' is a required property"),
        ("space", {"base": {"down": []}, "latent_size": 8}, "is not valid under any"),
        ("recipe", {"architecture": "sd15", "stages": []}, "[] should be non-empty"),
        ("comparison", {"recipe": {"stages": []}}, "required property"),
        ("architecture", {"down": [{"channels": "wide"}]}, "'wide' is not of type 'integer'"),
    ],
)
def test_a_mistake_is_found(kind: SchemaKind, values: dict[str, Any], problem: str) -> None:
    assert any(problem in error.message for error in validator(kind).iter_errors(values))


def test_a_name_may_be_left_out_and_a_sampler_be_a_word() -> None:
    validator("study").validate({"space": "emoji", "sampler": "tpe", "trials": 3})


def test_a_default_that_depends_is_left_out() -> None:
    study = schemas.schema("study")
    assert "default" not in study["properties"]["sampler"]
    assert "default" not in study["$defs"]["SamplerConfig"]["properties"]["name"]
    assert study["required"] == ["space"]


def test_fields_are_described_by_their_docstrings() -> None:
    latency = schemas.schema("study")["$defs"]["LatencyConfig"]["properties"]
    assert latency["remote"]["description"].startswith("Whether `archsearch serve-device`")
    level = schemas.schema("architecture")["$defs"]["LevelConfig"]["properties"]
    assert "description" in level["layers"], "a base's field"


def test_an_unknown_kind_is_told_the_kinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["archsearch", "schema", "sutdy"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err == f"archsearch: sutdy: is not a kind of file; use one of: {', '.join(TYPES)}\n"


@pytest.mark.parametrize("kind", TYPES)
def test_the_command_prints_a_schema(
    kind: SchemaKind, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["archsearch", "schema", kind])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == schema_path(kind).read_text()

"""YAML in the pages is what its settings allow, and Python in them imports what there is."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from _pytest.mark import ParameterSet

from archsearch.spaces.loading import SpaceConfig
from archsearch.studies.config.study import StudyConfig
from archsearch.training.comparison import ComparisonConfig
from archsearch.training.recipe import Recipe
from snapgen.config import Config, parse_config
from tests.docs.pages import PAGES, ROOT, Block, blocks, name

STAGE = {"kind": "flow_matching", "name": "base", "resolution": 32, "num_images": 1}
KINDS: tuple[tuple[type[Config], Mapping[str, Any]], ...] = (
    (StudyConfig, {"name": "x", "space": "emoji", "trials": 1}),
    (Recipe, {"name": "x", "architecture": "snapgen-emoji", "stages": [STAGE]}),
    (ComparisonConfig, {"name": "x"}),
    (SpaceConfig, {"base": "snapgen-emoji", "latent_size": 8}),
)
"""Settings files, and what a page's excerpt may leave out."""


def examples(language: str) -> list[ParameterSet]:
    """The blocks of a language in the pages of docs/ and at the top."""
    pages = (page for page in PAGES if page.is_relative_to(ROOT / "docs") or page.parent == ROOT)
    return [
        pytest.param(block, id=f"{name(page)}:{block.line}")
        for page in pages
        for block in blocks(page.read_text())
        if block.language == language
    ]


@pytest.mark.parametrize("block", examples("yaml"))
def test_yaml_is_valid(block: Block) -> None:
    values = yaml.safe_load(block.text)
    fitting = [(kind, rest) for kind, rest in KINDS if values.keys() <= kind.model_fields.keys()]
    assert fitting, f"no settings file has all of these keys: {', '.join(values)}"
    kind, rest = fitting[0]
    parse_config({**rest, **values}, kind, source="the example")


@pytest.mark.parametrize("block", examples("python"))
def test_python_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"

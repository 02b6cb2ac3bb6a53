from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from archsearch.studies.lookup import find_architecture
from archsearch.training import comparison
from archsearch.training.comparison import ComparisonConfig, compare, load_comparison
from snapgen.errors import InputError

ARCH = {
    "latent_channels": 4,
    "context_dim": 384,
    "norm_groups": 4,
    "down": [{"channels": 8, "num_res_blocks": 1}, {"channels": 8, "num_res_blocks": 1}],
    "up": [{"channels": 8, "num_res_blocks": 2}, {"channels": 8, "num_res_blocks": 2}],
}
STAGE = {"kind": "flow_matching", "name": "student", "resolution": 32, "num_images": 32, "batch_size": 16}
DECODER = {"kind": "decoder", "name": "decoder"}
VALUES: dict[str, Any] = {
    "recipe": {
        "architecture": "arch.yaml",
        "evaluation": {"num_samples": 0, "validation_pairs": 16, "num_inference_steps": 2},
        "stages": [STAGE],
    },
    "seeds": [3, 4],
    "variants": {
        "plain": {},
        "fast": {"overrides": {"stages[0].learning_rate": 0.05}},
        "judged": {"checkpoint": "runs/small-fast-{seed}/stages/01-student", "sampling": {"num_inference_steps": 1}},
    },
    "baseline": "plain",
    "metrics": {"validation_loss": "lower"},
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch.yaml").write_text(yaml.safe_dump(ARCH))
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def never(*_: object, **__: object) -> None:
    raise AssertionError("was trained")


def written(path: Path, **changes: Any) -> ComparisonConfig:
    path.write_text(yaml.safe_dump(VALUES | changes))
    return load_comparison(path)


def test_every_variant_is_judged_with_every_seed_and_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    results = compare(load_comparison(small), log=told.append)
    assert {name: len(runs) for name, runs in results.items()} == {"plain": 2, "fast": 2, "judged": 2}
    losses = {name: [run["validation_loss"].value for run in runs] for name, runs in results.items()}
    assert losses["judged"] == pytest.approx(losses["fast"]), "the same nets, judged apart"
    assert losses["plain"] != losses["fast"]
    assert losses["plain"][0] != losses["plain"][1]

    monkeypatch.setattr(comparison, "train", never)
    again = compare(load_comparison(small), log=told.append)
    assert again == results


def test_variants_that_evaluate_the_same_net_are_known(small: Path) -> None:
    nets = load_comparison(small).nets
    assert nets["judged"] == nets["fast"] == "runs/small-fast-3/stages/01-student"
    assert nets["plain"] == "runs/small-plain-3/stages/01-student"
    apart = written(small, variants={"plain": {}, "other": {}}).nets
    assert apart["plain"] != apart["other"]


def test_a_variant_that_was_changed_is_judged_anew(small: Path) -> None:
    of_another_seed = {"checkpoint": "runs/small-plain-4/stages/01-student"}
    first = compare(written(small, variants={"plain": {}, "other": {}}), log=lambda _: None)
    second = compare(written(small, variants={"plain": {}, "other": of_another_seed}), log=lambda _: None)
    assert second["plain"] == first["plain"] == first["other"]
    assert second["other"] == [first["plain"][1]] * 2


def test_a_net_that_was_replaced_is_evaluated_anew(small: Path) -> None:
    first = compare(load_comparison(small), log=lambda _: None)
    net = Path("runs/small-fast-3/stages/01-student")
    shutil.rmtree(net)
    shutil.copytree("runs/small-plain-3/stages/01-student", net)
    second = compare(load_comparison(small), log=lambda _: None)
    assert second["judged"] == [first["plain"][0], first["judged"][1]]
    (net / "config.json").unlink()
    assert compare(load_comparison(small), log=lambda _: None) == second
    shutil.rmtree("runs/small-fast-3")
    assert compare(load_comparison(small), log=lambda _: None) == second, "what is gone tells nothing new"


def test_a_result_without_its_numbers_is_damaged(small: Path) -> None:
    compare(load_comparison(small), log=lambda _: None)
    path = Path("runs/small/judged-3.json")
    for text in ('{"recipe": {}', "[]", json.dumps(json.loads(path.read_text()) | {"numbers": {}})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"judged-3.json: is damaged; remove it to evaluate the variant again"):
            compare(load_comparison(small), log=lambda _: None)


def test_a_trained_variant_is_not_changed_in_silence(small: Path) -> None:
    compare(written(small, variants={"plain": {}, "other": {}}), log=lambda _: None)
    hotter = {"overrides": {"stages[0].learning_rate": 0.5}}
    with pytest.raises(InputError, match=r"stages\[0\]\.learning_rate: this run was begun with 0\.01, not 0\.5"):
        compare(written(small, variants={"plain": {}, "other": hotter}), log=lambda _: None)


def test_shipped_comparisons_are_recipes_with_what_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("distillation", "steps", "guided_steps", "emoji_styles", "emoji_styles_64"):
        found = load_comparison(name)
        for variant in found.variants:
            made = found.recipe_of(variant, 7)
            assert made.seed == 7
            assert "{seed}" not in made.model_dump_json()
            find_architecture(made.architecture)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"baseline": "nobody"}, "nobody"),
        ({"variants": {"plain": {}, "b": {"baselines": ["b"]}}}, "variants.b.baselines[0] is 'b'"),
        ({"variants": {"plain": {}, "b": {"baselines": ["no"]}}}, "which is no other variant; use some of: plain"),
        ({"seeds": [1, 1]}, "twice"),
        ({"metrics": {"beauty": "higher"}}, "beauty"),
        ({"variants": {"plain": {}, "b": {"overrides": {"stages[4].batch": 2}}}}, "does not exist in the recipe"),
        ({"variants": {"plain": {}, "b": {"overrides": {"stages[0].batch!": 2}}}}, "not a valid step of a path"),
        ({"variants": {"plain": {}, "b": {"overrides": {"stages[0].batsch": 2}}}}, "stages[0].batsch"),
        ({"variants": {"plain": {}, "b": {"checkpoint": "nowhere"}}}, "variants.b.checkpoint: nowhere"),
        ({"variants": {"plain": {}, "b": {"overrides": {"init_weights": "nowhere"}}}}, "variants.b.init_weights"),
        ({"variants": {"plain": {}, "b": {"overrides": {"architecture": "nowhere"}}}}, "variants.b.architecture"),
        ({"variants": {"plain": {}, "b": {"overrides": {"data": "nowhere"}}}}, "variants.b.data"),
        ({"variants": {"plain": {}, "b": {"overrides": {"seed": 7}}}}, "variants.b.overrides.seed is set by the"),
        ({"variants": {"plain": {}, "b": {"baselines": ["plain", "plain"]}}}, "lists 'plain' twice"),
        ({"recipe": {**VALUES["recipe"], "name": "mine"}}, "recipe.name is set by the comparison itself; remove it"),
        ({"variants": {"plain": {}, "b": {"overrides": {"stages": [DECODER]}}}}, "variants.b.stages: no stage trains"),
        ({"metrics": {"kernel_distance": "lower"}}, "metrics: kernel_distance is not measured; use validation_loss"),
        ({"seeds": [0, -1]}, "seed: -1 is too small"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(
    small: Path, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "train", never)
    with pytest.raises(InputError) as caught:
        compare(written(small, **changes), log=lambda _: None)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)

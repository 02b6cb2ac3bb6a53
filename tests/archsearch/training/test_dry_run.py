from __future__ import annotations

from pathlib import Path

import pytest

from archsearch.cost.counter import cost
from archsearch.studies.lookup import find_architecture
from archsearch.training.compatibility import resolve_shapes
from archsearch.training.dry_run import plan
from archsearch.training.recipe import load_recipe
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from tests.archsearch.studies.tiny_recipe import DECODER, recipe


def test_the_plan_of_the_tiny_recipe_adds_up(tmp_path: Path) -> None:
    found, arch = recipe(tmp_path)
    given = resolve_shapes(found)
    made = plan(found, arch, given, examples=36, captions=3, timed=False)
    by_name = {stage.name: stage for stage in made.stages}
    assert [stage.name for stage in made.stages] == ["teacher", "base", "distil", "steps", "decoder"]
    assert [(s.steps, s.batch, s.images, s.micro_batch_size) for s in made.stages] == [
        (4, 4, 16, 4),
        (4, 4, 16, 2),
        (4, 4, 16, 4),
        (4, 4, 16, 4),
        (4, 4, 16, 4),
    ]
    assert (made.steps, made.images) == (20, 80)
    assert made.macs == sum(stage.macs for stage in made.stages)
    assert by_name["base"].epochs == pytest.approx(16 / 36)
    assert by_name["decoder"].epochs == 16 / 20, "of the images that it holds"

    student = cost(arch, 8, context_tokens=8)
    own = given.teachers[None]
    teacher_params = sum(weight.numel() for weight in own.parameters())
    assert by_name["base"].params == by_name["base"].net_params == student.params
    assert by_name["base"].macs == 3 * 16 * student.macs
    assert (by_name["teacher"].params, by_name["teacher"].teacher_params) == (teacher_params, 0)
    lesson = by_name["teacher"].macs // (3 * 16)
    # φ: 3×3 from 8 to 8·2² channels with stride 2, then 1×1 to the teacher's 2 heads of 8
    assert by_name["distil"].params == student.params + (9 * 8 * 32 + 32) + (32 * 16 + 16)
    assert by_name["distil"].teacher_params == teacher_params
    assert by_name["distil"].macs == 16 * (3 * student.macs + lesson)
    # two blocks, a head each: 1×1 of 16, 3×3 of 16, 1×1 to 1
    head = (16 * 16 + 16) + (9 * 16 * 16 + 16) + (16 + 1)
    assert by_name["steps"].params == student.params + 2 * head
    assert by_name["steps"].macs == 16 * (3 * student.macs + (1 + 4) * lesson)
    decoder = TinyDecoder(latent_channels=4, **DECODER)
    assert by_name["decoder"].params == sum(weight.numel() for weight in decoder.parameters())


def test_memory_of_weights(tmp_path: Path) -> None:
    found, arch = recipe(tmp_path)
    base = plan(found, arch, resolve_shapes(found), examples=None, captions=None, timed=False).stages[1]
    assert base.memory == 4 * 5 * base.params, "weights, gradients, two moments, the average"
    assert base.epochs is None


def test_disk(tmp_path: Path) -> None:
    found, arch = recipe(tmp_path)
    made = plan(found, arch, resolve_shapes(found), examples=36, captions=3, timed=False)
    assert made.disk == {"latents at 32 px": 36 * 4 * 8 * 8 * 2, "text embeddings": 3 * (8 * 384 + 384) * 2}


def test_checkpointing_keeps_less_and_computes_more(tmp_path: Path) -> None:
    found, arch = recipe(tmp_path)
    stages = [{**stage.model_dump(mode="json")} for stage in found.stages[:2]]
    stages[1]["gradient_checkpointing"] = True
    leaner, _ = recipe(tmp_path, stages=stages)
    plans = [
        plan(r, arch, resolve_shapes(r), examples=None, captions=None, timed=False).stages[1] for r in (found, leaner)
    ]
    assert plans[1].image_memory < plans[0].image_memory
    assert plans[1].macs * 3 == plans[0].macs * 4


def test_time_is_of_a_pass_here(tmp_path: Path) -> None:
    found, arch = recipe(tmp_path)
    made = plan(found, arch, resolve_shapes(found), examples=None, captions=None, timed=True)
    assert made.macs_per_second is not None
    assert made.seconds(made.macs) == pytest.approx(made.macs / made.macs_per_second)


@pytest.mark.parametrize(
    ("name", "params", "steps", "epochs"),
    [
        ("snapgen_imagenet", 372.2, [150_137], 120.0),
        ("snapgen_t2i", 379.3, [400_000, 100_000, 100_000, 20_000, 1_000_000], None),
    ],
)
def test_the_papers_recipes(name: str, params: float, steps: list[int], epochs: float | None) -> None:
    found = load_recipe(name)
    assert found.expected_shapes is not None
    given = resolve_shapes(found, without_files=True)
    made = plan(
        found,
        find_architecture(found.architecture),
        given,
        examples=found.expected_shapes.images,
        captions=None,
        timed=False,
    )
    assert [stage.steps for stage in made.stages] == steps
    assert made.stages[0].net_params / 1e6 == pytest.approx(params, abs=0.05)
    if epochs is not None:
        assert made.stages[0].epochs == pytest.approx(epochs, abs=1e-3)
        return
    assert {round(stage.teacher_params / 1e9, 2) for stage in made.stages} == {8.06, 0}
    assert made.stages[-1].params / 1e6 == pytest.approx(1.38, abs=0.005)
    assert made.stages[0].params - made.stages[0].net_params == (9 * 256 * 1024 + 1024) + (1024 * 2432 + 2432)

"""The figure of a finished run: the same captions and noise, drawn by several of its nets in several ways."""

from __future__ import annotations

import contextlib
import csv
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from archsearch.quality.evaluator import SamplingConfig
from archsearch.stats.estimate import Estimate
from archsearch.training.evaluation import StageEvaluator, finite_outputs, process_of
from archsearch.training.recipe import FigureConfig, FigureRow, Recipe
from archsearch.training.run_folder import RunFolder, read_unet
from snapgen.architecture.schema import Architecture
from snapgen.io.atomic import atomic_write
from snapgen.io.digests import digest_contents
from snapgen.training.stages import NetStage

PICTURE, GAP, LABELS = 128, 6, 220
"""Pixels of a picture's side, between two pictures, and of the column of labels."""
FONT = 20
"""Size of the letters, in pixels. A figure of sixteen columns is shown at less than half its width on a page."""
FONTS = ("LiberationSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "Arial.ttf", "arial.ttf")
"""Fonts of Linux, macOS and Windows with the letters of many languages; those of Pillow's own are few."""
LINE, CAPTION_LINES = 24, 3
"""Pixels of a line of text, and most lines of a caption."""
HEADER = (CAPTION_LINES + 1) * LINE + 2 * GAP
"""Pixels above the pictures: kind and text of the captions."""
SETTINGS, TABLE = "figure", "table"
"""Keys under which the picture tells the digests of its settings and of the table beside it."""
COLUMNS = ("stage", "steps", "guidance", "evaluations", "retrieval_r1", "low", "high", "captions")


def draw_figure(
    recipe: Recipe, arch: Architecture, folder: RunFolder, evaluator: StageEvaluator, log: Callable[[str], None]
) -> None:
    """Draw the figure of a recipe's finished stages and write ``figure.png`` and ``figure.csv`` into the run's folder.

    Args:
        recipe: a recipe with a figure.
        arch: architecture of the student.
        folder: the run's folder, with the results of the stages.
        evaluator: evaluator of the recipe's nets.
        log: called with a line for each row: how often its pictures retrieve their own captions among those of the
            figure, if the evaluations measure retrieval.

    Raises:
        InputError: if samples are not finite, or a file cannot be written.
    """
    assert recipe.figure is not None
    kinds = _kinds(recipe.figure, evaluator)
    captions = [caption for group in kinds.values() for caption in group]
    names = [stage.name for stage in recipe.stages]
    pictures: list[Tensor] = []
    scores: list[Estimate | None] = []
    for row in recipe.figure.rows:
        number = names.index(row.stage)
        net = read_unet(folder.result(number), arch)
        assert net is not None
        stage = recipe.stages[number]
        assert isinstance(stage, NetStage)
        at = evaluator.at(stage.resolution)
        sampling = SamplingConfig(row.num_inference_steps, row.guidance_scale, stage.timestep_shift_value)
        with finite_outputs(f"stage {row.stage}"):
            images = at.sample_images(
                net.to(evaluator.data.device), process_of(recipe, net, sampling), sampling, captions
            )
        pictures.append(images)
        score = at.retriever.score(images, captions).r1 if _retrieves(recipe) else None
        scores.append(score)
        share = f"{score.value:.0%} of the pictures retrieve their own captions" if score else "drawn"
        log(f"figure: {row_label(row)}: {share}")
    table = folder.figure.with_suffix(".csv")
    _write_table(table, recipe.figure.rows, scores, len(captions))
    facts = PngInfo()
    facts.add_text(SETTINGS, _settings(recipe))
    facts.add_text(TABLE, digest_contents([table]))
    with atomic_write(folder.figure) as file:
        _sheet(kinds, recipe.figure.rows, pictures).save(file, format="png", pnginfo=facts)


def is_drawn(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the run's folder has the recipe's figure and its table, whole and of its present nets."""
    try:
        with Image.open(folder.figure) as image:
            image.load()
            made_of = image.info.get(SETTINGS), image.info.get(TABLE)
        return made_of == (_settings(recipe), digest_contents([folder.figure.with_suffix(".csv")]))
    except (OSError, SyntaxError, ValueError):  # there is none, or it is damaged
        return False


def _settings(recipe: Recipe) -> str:
    assert recipe.figure is not None
    return f"{recipe.figure.digest()}, {'with' if _retrieves(recipe) else 'without'} retrieval"


def _retrieves(recipe: Recipe) -> bool:
    return "retrieval_r1" in recipe.evaluation.metrics


def _kinds(figure: FigureConfig, evaluator: StageEvaluator) -> dict[str, list[str]]:
    """The captions by what the nets know of them, the trained ones first."""
    resolution = min(stage.resolution for stage in evaluator.recipe.stages if isinstance(stage, NetStage))
    trained = set(evaluator.trained_on.images("train", resolution).captions)
    held_out = set(evaluator.data.images("val", resolution).captions)
    captions = [*dict.fromkeys(figure.captions)]
    kinds = {
        "captions of training images": [c for c in captions if c in trained],
        "held-out captions": [c for c in captions if c in held_out and c not in trained],
        "other captions": [c for c in captions if c not in held_out and c not in trained],
    }
    return {kind: group for kind, group in kinds.items() if group}


def row_label(row: FigureRow) -> str:
    """The stage of a row and how it is sampled: ``base, 1 step, unguided``."""
    guided = "unguided" if row.guidance_scale == 1 else f"guidance {row.guidance_scale:g}"
    return f"{row.stage}, {row.num_inference_steps} step{'s' * (row.num_inference_steps > 1)}, {guided}"


def _evaluations(row: FigureRow) -> int:
    return row.num_inference_steps * (1 if row.guidance_scale == 1 else 2)


def _write_table(path: Path, rows: Sequence[FigureRow], scores: Sequence[Estimate | None], captions: int) -> None:
    with atomic_write(path) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row, score in zip(rows, scores, strict=True):
            numbers = [f"{number:.4f}" for number in (score.value, score.low, score.high)] if score else [""] * 3
            table.writerow(
                [row.stage, row.num_inference_steps, f"{row.guidance_scale:g}", _evaluations(row), *numbers, captions]
            )


def _sheet(kinds: dict[str, list[str]], rows: Sequence[FigureRow], pictures: Sequence[Tensor]) -> Image.Image:
    """The pictures of each row, (N, 3, H, W), in a block for each kind of captions, with labels."""
    pitch, font = PICTURE + GAP, _font()
    block = HEADER + len(rows) * pitch + 2 * GAP
    sheet = Image.new("RGB", (LABELS + max(map(len, kinds.values())) * pitch, len(kinds) * block), "white")
    draw = ImageDraw.Draw(sheet)
    first = 0  # index of the block's first caption
    for number, (kind, captions) in enumerate(kinds.items()):
        top = number * block
        draw.text((LABELS, top), kind, "black", font)
        draw.line((LABELS, top + LINE, LABELS + len(captions) * pitch - GAP, top + LINE), "black")
        for column, caption in enumerate(captions):
            left = LABELS + column * pitch
            draw.multiline_text((left, top + LINE + GAP), _wrapped(caption, font), "black", font)
            for line, images in enumerate(pictures):
                pixels = images[first + column].permute(1, 2, 0).numpy()  # CHW -> HWC
                picture = Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
                sheet.paste(picture, (left, top + HEADER + line * pitch))
        for line, row in enumerate(rows):
            label, middle = row_label(row).replace(", ", "\n", 1), top + HEADER + line * pitch + PICTURE // 2
            draw.multiline_text((4, middle), label, "black", font, anchor="lm")
        first += len(captions)
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, FONT)
    return ImageFont.load_default(FONT)


def _wrapped(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A caption in lines about as wide as a picture, cut where the lines are too many."""
    letter = max(font.getlength("n"), font.getlength(caption) / max(len(caption), 1))  # Chinese ones are twice as wide
    lines = textwrap.wrap(
        caption, int(PICTURE / letter), max_lines=CAPTION_LINES, placeholder="…", break_on_hyphens=False
    )
    return "\n".join(lines)

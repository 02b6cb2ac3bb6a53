"""The model card of a pipeline, a ``README.md`` in its folder, and what lets diffusers load the folder.

The card says what the pipeline's own files tell; a training adds its data, recipe, protocol, scores and latencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapgen.io.safetensors_header import add_facts

CARD = "README.md"
LOADER = "pipeline.py"
_LOADER = '''"""Lets diffusers find the pipeline's class: it belongs to the package archsearch."""

from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline

__all__ = ["SnapGenPipeline"]
'''
LIMITS = (
    "It draws what its training images show; whatever else a prompt asks for, it draws as one of those.",
    "No filter looks at prompts or images.",
)


def write_card(folder: Path, pipeline: Any, sections: Mapping[str, str] | None = None) -> None:
    """Write the card, the loader, and the facts in the header of each component's weights.

    Args:
        folder: a pipeline's folder.
        pipeline: the pipeline in it, a `snapgen.pipeline.snapgen_pipeline.SnapGenPipeline`.
        sections: further sections of Markdown by their heading, in order.
    """
    facts = {
        "archsearch.architecture": pipeline.unet.arch.id,
        "archsearch.prediction": str(pipeline.config.prediction),
        "archsearch.steps": str(pipeline.config.steps),
        "archsearch.guidance": str(pipeline.config.guidance),
    }
    for weights in folder.rglob("*.safetensors"):
        add_facts(weights, facts)
    (folder / LOADER).write_text(_LOADER)
    (folder / CARD).write_text(card(pipeline, folder.resolve().parent.name, sections or {}), encoding="utf-8")


def card(pipeline: Any, name: str, sections: Mapping[str, str]) -> str:
    """The text of a card; what nobody but its author can know is marked FILL IN."""
    config, arch = pipeline.config, pipeline.unet.arch
    parts = {"U-Net": pipeline.unet, "autoencoder": pipeline.vae, "tiny decoder": pipeline.decoder}
    parts |= {f"text encoder {i}": encoder for i, (encoder, _) in enumerate(pipeline.text_encoders, 1)}
    rows = [
        f"| {part} | {type(net).__name__} | {sum(p.numel() for p in net.parameters()):,} |"
        for part, net in parts.items()
        if net is not None
    ]
    side = "" if config.resolution is None else f" of {config.resolution} × {config.resolution} pixels"
    guided = "without guidance" if config.guidance == 1 else f"with guidance {config.guidance:g}"
    steps = "1 step" if config.steps == 1 else f"{config.steps} steps"
    what = (
        f"A latent diffusion model that draws images{side} in {steps} {guided}. Architecture "
        f"`{arch.id}`, prediction type {config.prediction}."
    )
    blocks = [
        "---\nlicense: other  # FILL IN: a licence that those of the data and of the text encoders permit\n"
        "library_name: diffusers\npipeline_tag: text-to-image\ntags: [archsearch, text-to-image]\n---",
        f"# {name}",
        what,
        "\n".join(["| part | class | parameters |", "|---|---|---|", *rows]),
        f"## How to load it\n\nWhere archsearch is installed (`pip install archsearch`):\n\n```python\n{USE}```",
        *(f"## {heading}\n\n{text}" for heading, text in sections.items()),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in LIMITS),
        "## Licence\n\nFILL IN.",
    ]
    return "\n\n".join(blocks) + "\n"


USE = """from diffusers import DiffusionPipeline

folder = "."  # this folder, or what huggingface_hub.snapshot_download("OWNER/NAME") returns
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipeline("a red apple").images[0].save("apple.png")
"""
"""The lines that load a pipeline's folder, as the card has them."""

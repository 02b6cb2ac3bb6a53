"""A trained net's weights for candidates to begin with: the supernetwork of an elastic search.

SnapFusion trains one net robustly and reads its sub-networks' worth off it (arXiv 2306.00980, section 3.1); here every
candidate is such a sub-network and is trained on for some steps.
"""

from __future__ import annotations

from pathlib import Path

import torch

from snapgen import config
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError, first_line
from snapgen.io import prediction_note
from snapgen.io.digests import digest_files
from snapgen.models import subnetworks
from snapgen.models.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"

_REMEDY = "give inherit the folder of a trained U-Net, e.g. runs/training-emoji_supernet/stages/01-robust"


def supernet_folder(name_or_path: str) -> Path:
    """The folder of a trained supernetwork.

    Raises:
        InputError: if there is none, or it holds no U-Net.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        raise InputError(path, "is no folder", _REMEDY)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise InputError(path, f"holds no {name}", _REMEDY)
    return path


def digest(name_or_path: str) -> str:
    """16 hex digits of a hash of a trained U-Net's description and weights.

    Raises:
        InputError: as `supernet_folder`.
    """
    home = supernet_folder(name_or_path)
    return digest_files([home / CONFIG, home / WEIGHTS], [CONFIG, WEIGHTS])


class Supernet:
    """A trained net, and the nets that take its weights.

    Args:
        name_or_path: as `supernet_folder` takes it.
        prediction: what candidates predict, which the trained net must have predicted.

    Raises:
        InputError: if it is missing or damaged, or predicts something else.
    """

    def __init__(self, name_or_path: str, *, prediction: str) -> None:
        self.path = supernet_folder(name_or_path)
        _check_prediction(self.path, prediction)
        try:
            Architecture.model_validate(config.read_mapping(self.path / CONFIG).get("arch"))
        except ValueError:
            raise InputError(self.path / CONFIG, "describes no U-Net of ours", _REMEDY) from None
        self.unet = _read(self.path)

    def check(self, arch: Architecture) -> None:
        """Refuse an architecture that is none of its sub-networks.

        Raises:
            InputError: naming the first thing that differs besides the number of blocks, or a block without weights.
        """
        ours, theirs = _frame(self.unet.arch), _frame(arch)
        source = f"architecture {arch.id}"
        for name in ours | theirs:
            a, b = theirs.get(name, "none"), ours.get(name, "none")
            if a != b:
                problem = f"is {a}; the net in {self.path}, whose weights it is to take, has {b}"
                raise InputError(source, problem, "train one of the space's base, or take another", place=name)
        places = {block.place for block in block_index.blocks(self.unet.arch)}
        for block in block_index.blocks(arch):
            if block.place not in places:
                problem = f"the net in {self.path} has no block there, so it has no weights for one"
                raise InputError(
                    source, problem, "train one that has it, or take it out of the space", place=block.label
                )

    def net(self, arch: Architecture, *, seed: int) -> UNet:
        """The net of an architecture that passed `check`, with the trained weights.

        Args:
            seed: of the weights that a copy of a block can not take over, as its shape is another.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return subnetworks.from_supernet(self.unet, arch)


def _check_prediction(path: Path, prediction: str) -> None:
    own = prediction_note.read_prediction_type(path)
    if own not in (None, prediction):  # None: written by something that leaves no such note
        problem = f"predicts {own!r}, candidates {prediction!r}"
        raise InputError(path, problem, "train it for the same prediction")


def _read(path: Path) -> UNet:
    try:
        unet, info = UNet.from_pretrained(path, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise kinds of their own for a damaged file
        problem = f"can not be read ({first_line(error)})"
        raise InputError(path / WEIGHTS, problem, "restore it, or train it again") from None
    missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if missing or not all(bool(weight.isfinite().all()) for weight in unet.parameters()):
        problem = f"lacks {missing[0]}" if missing else "has weights that are not finite"
        raise InputError(path / WEIGHTS, problem, "restore it, or train it again")
    found: UNet = unet.eval().requires_grad_(False)
    return found


def _frame(arch: Architecture) -> dict[str, object]:
    """All of a description but how many blocks each layer has."""
    counts = {"residual_blocks", "transformers", "layers"}
    found: dict[str, object] = arch.model_dump(exclude={"down", "mid", "up"})
    for site, blocks, channels in arch.sites():
        found[f"{site}.channels"] = channels
        found[f"{site}.layers"] = len(blocks.dealt(ends_plain=site == "mid"))
        found |= {f"{site}.{name}": value for name, value in blocks.model_dump(exclude=counts).items()}
    return found

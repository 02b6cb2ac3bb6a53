"""Supernetwork: a trained net that provides candidates with their initial weights.

SnapFusion trains one net robustly and evaluates its sub-networks (arXiv 2306.00980, section 3.1); here every candidate
is such a sub-network and is trained further for some steps.
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

_REMEDY = "give init_from the folder of a trained U-Net, e.g. runs/training-emoji_supernet/stages/01-robust"


def supernet_folder(name_or_path: str) -> Path:
    """The folder of a trained supernetwork.

    Raises:
        InputError: if it does not exist or contains no U-Net.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        raise InputError(path, "is not a folder", _REMEDY)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise InputError(path, f"does not contain {name}", _REMEDY)
    return path


def digest(name_or_path: str) -> str:
    """Digest (16 hex digits) of a trained U-Net's architecture and weights.

    Raises:
        InputError: like `supernet_folder`.
    """
    folder = supernet_folder(name_or_path)
    return digest_files([folder / CONFIG, folder / WEIGHTS], [CONFIG, WEIGHTS])


class Supernet:
    """A trained net whose weights initialize its sub-networks.

    Args:
        name_or_path: folder of the trained net, see `supernet_folder`.
        prediction: prediction type of the candidates, which must be that of the trained net.

    Raises:
        InputError: if the net is missing or damaged, or has another prediction type.
    """

    def __init__(self, name_or_path: str, *, prediction: str) -> None:
        self.path = supernet_folder(name_or_path)
        _check_prediction(self.path, prediction)
        try:
            Architecture.model_validate(config.read_mapping(self.path / CONFIG).get("arch"))
        except ValueError:
            raise InputError(self.path / CONFIG, "does not describe a U-Net of this project", _REMEDY) from None
        self.unet = _read(self.path)

    def check(self, arch: Architecture) -> None:
        """Check that an architecture is a sub-network of the trained net.

        Raises:
            InputError: naming the first difference other than the number of blocks, or a block without weights.
        """
        supernet_fields, candidate_fields = _fixed_fields(self.unet.arch), _fixed_fields(arch)
        source = f"architecture {arch.id}"
        for name in supernet_fields | candidate_fields:
            actual, expected = candidate_fields.get(name, "none"), supernet_fields.get(name, "none")
            if actual != expected:
                problem = f"is {actual}; the supernetwork in {self.path} has {expected}"
                raise InputError(
                    source, problem, "train a supernetwork of the space's base, or use another", place=name
                )
        sites = {block.block_site for block in block_index.blocks(self.unet.arch)}
        for block in block_index.blocks(arch):
            if block.block_site not in sites:
                problem = f"the supernetwork in {self.path} has no block at this site, so it has no weights for one"
                remedy = "train a supernetwork that has it, or remove it from the space"
                raise InputError(source, problem, remedy, place=block.label)

    def net(self, arch: Architecture, *, seed: int) -> UNet:
        """Build an architecture that passed `check`, initialized with the trained weights.

        Args:
            arch: the sub-network.
            seed: seed of weights that a copy of a block cannot inherit because their shapes differ.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return subnetworks.from_supernet(self.unet, arch)


def _check_prediction(path: Path, prediction: str) -> None:
    trained = prediction_note.read_prediction_type(path)
    if trained not in (None, prediction):  # None: written by software that does not record it
        problem = f"predicts {trained!r}, candidates {prediction!r}"
        raise InputError(path, problem, "train it with the same prediction type")


def _read(path: Path) -> UNet:
    try:
        unet, info = UNet.from_pretrained(path, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise various errors for a damaged file
        problem = f"cannot be read ({first_line(error)})"
        raise InputError(path / WEIGHTS, problem, "restore it, or train it again") from None
    missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if missing or not all(bool(weight.isfinite().all()) for weight in unet.parameters()):
        problem = f"lacks {missing[0]}" if missing else "has weights that are not finite"
        raise InputError(path / WEIGHTS, problem, "restore it, or train it again")
    frozen: UNet = unet.eval().requires_grad_(False)
    return frozen


def _fixed_fields(arch: Architecture) -> dict[str, object]:
    """All fields of an architecture except the number of blocks in each layer."""
    counts = {"num_res_blocks", "num_transformers", "layers"}
    fields: dict[str, object] = arch.model_dump(exclude={"down", "mid", "up"})
    for site, blocks, channels in arch.named_levels():
        fields[f"{site}.channels"] = channels
        fields[f"{site}.layers"] = len(blocks.layer_counts(is_mid=site == "mid"))
        fields |= {f"{site}.{name}": value for name, value in blocks.model_dump(exclude=counts).items()}
    return fields

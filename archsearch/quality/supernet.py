"""Supernetwork: a trained net that provides candidates with their initial weights.

SnapFusion trains one net robustly and evaluates its sub-networks (arXiv 2306.00980, section 3.1); here every candidate
is such a sub-network and is trained further for some steps.
"""

from __future__ import annotations

from pathlib import Path

import torch

from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io import pretrained
from snapgen.io.digests import digest_files
from snapgen.io.prediction_type import check_prediction_type
from snapgen.models import subnetworks
from snapgen.models.unet import UNet, load_unet

_REMEDY = "give init_from the folder of a trained U-Net, e.g. runs/training-emoji_supernet/stages/01-robust"


def supernet_folder(name_or_path: str) -> Path:
    """The folder of a trained supernetwork.

    Raises:
        InputError: if it does not exist.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        raise InputError(path, "is not a folder", _REMEDY)
    return path


def digest(name_or_path: str) -> str:
    """Digest (16 hex digits) of a trained U-Net's architecture and weights.

    Raises:
        InputError: like `supernet_folder`, or if it contains no net.
    """
    folder = supernet_folder(name_or_path)
    files = [folder / pretrained.CONFIG_NAME, *pretrained.weight_files(folder)]
    return digest_files(files, [file.name for file in files])


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
        check_prediction_type(self.path, prediction)
        self.unet = load_unet(self.path).requires_grad_(False)

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


def _fixed_fields(arch: Architecture) -> dict[str, object]:
    """All fields of an architecture except the number of blocks in each layer."""
    counts = {"num_res_blocks", "num_transformers", "layers"}
    fields: dict[str, object] = arch.model_dump(exclude={"down", "mid", "up"})
    for site, blocks, channels in arch.named_levels():
        fields[f"{site}.channels"] = channels
        fields[f"{site}.layers"] = len(blocks.layer_counts(is_mid=site == "mid"))
        fields |= {f"{site}.{name}": value for name, value in blocks.model_dump(exclude=counts).items()}
    return fields

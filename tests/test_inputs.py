"""Whatever a user gets wrong ends in one line with the remedy and exit status 2, and leaves nothing half-written."""

from __future__ import annotations

import io
import json
import os
import pickle
import sqlite3
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from archsearch import cli
from snapgen.architecture.presets import preset
from snapgen.config import MAX_FILE_BYTES

STUDY = {"space": "emoji", "trials": 1, "protocol": {"steps": 2, "num_samples": 8}}
SPACE = {
    "latent_size": 8,
    "context_tokens": 16,
    "base": {
        "latent_channels": 4,
        "context_dim": 384,
        "norm_groups": 8,
        "down": [{"channels": 16}, {"channels": 32}],
        "up": [{"channels": 16}, {"channels": 32}],
    },
    "knobs": {
        "levels[0].num_res_blocks": [1, 2],
        "convs": {"a": {"all.conv": "standard"}, "b": {"all.conv": "separable"}},
    },
}

MULTIPLIED = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else '1'] * 10)}]" for i in range(9))
"""A list of a thousand million ones, in a few lines."""

Case = tuple[list[str], str]
"""The arguments, and what the line must name."""


def study(folder: Path, text: str | None = None, **changes: object) -> Case:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}) if text is None else text)
    return ["search", str(path)], "study.yaml"


def protocol(folder: Path, **changes: object) -> Case:
    return study(folder, protocol={**STUDY["protocol"], **changes})  # type: ignore[dict-item]


def evolving(
    folder: Path, names: str = "study.yaml", *, evolve: dict[str, object] | None = None, **changes: object
) -> Case:
    how = {"target_ms": 1.0, "round_steps": 2, **(evolve or {})}
    one_seed = {"steps": 2, "num_samples": 8, "train_seeds": [0]}
    study(folder, **{"space": "emoji-blocks", "evolve": how, "protocol": one_seed, **changes})
    return ["evolve", str(folder / "study.yaml")], names


def space(folder: Path, text: str | None = None, **changes: object) -> Case:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({**SPACE, **changes}) if text is None else text)
    return ["space", "show", str(path)], "space.yaml"


def generate(folder: Path, index: bytes | None = None) -> Case:
    """A run whose pipeline has this index, or is not there yet."""
    (folder / "run" / "pipeline").mkdir(parents=True)
    if index is not None:
        (folder / "run" / "pipeline" / "model_index.json").write_bytes(index)
    return ["generate", str(folder / "run"), "a fox", "--out", str(folder / "fox.png")], "run"


def data(folder: Path, name: str) -> Case:
    arguments, _ = protocol(folder, data=str(folder / name))
    return arguments, name


def extractor(folder: Path, content: bytes | None) -> Case:
    path = folder / "inception.pth"
    if content is not None:
        path.write_bytes(content)
    arguments, _ = protocol(folder, feature_extractor=str(path))
    return arguments, "inception.pth"


def rungs(folder: Path, names: str, *steps: object, **changes: object) -> Case:
    """A study of one seed and eight steps with these rungs."""
    one_seed = {"steps": 8, "num_samples": 0, "train_seeds": [0]}
    return study(folder, **{"protocol": one_seed, "rungs": {"steps": [*steps]}, **changes})[0], names


def storage(folder: Path, url: str, names: str) -> Case:
    arguments, _ = study(folder, storage=url)
    return arguments, names


def ablation(folder: Path, changes: object = None, *, final: str = "1", over: object = "0", **given: object) -> Case:
    """An ablation of one row, with something wrong in it or beside it."""
    row = {"title": "one", "baseline": over, "overrides": {"qk_norm": True} if changes is None else changes}
    rows = {"rows": {"0": {"title": "base"}, "1": row}, "final_row": final}
    values = {"space": "emoji", "ablation": rows, "protocol": {"train_seeds": [0, 1, 2]}, **given}
    return ["ablate", study(folder, yaml.safe_dump(values))[0][1]], "study.yaml"


def of_weights(folder: Path, content: bytes) -> Case:
    path = written(folder / "inception.pth", content)
    return ablation(folder, protocol={"train_seeds": [0, 1, 2], "feature_extractor": str(path)})[0], "inception.pth"


def without(key: str, of: dict[str, object]) -> str:
    return str(yaml.safe_dump({k: v for k, v in of.items() if k != key}))


def knobs(folder: Path, **changes: object) -> Case:
    return space(folder, knobs={**SPACE["knobs"], **changes})  # type: ignore[dict-item]


def image_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def folder_of(folder: Path, name: str, **files: bytes) -> Case:
    (folder / name).mkdir()
    for file, content in files.items():
        (folder / name / file.replace("_", ".")).write_bytes(content)
    return data(folder, name)


def shard(folder: Path, *, keep: int | None = None, entries: int = 1) -> Case:
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(entries):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(image_bytes())
            tar.addfile(info, io.BytesIO(image_bytes()))
    if keep is not None:
        path.write_bytes(path.read_bytes()[:keep])
    return data(folder, "shard.tar")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (sys.exit, (99,))


def half_database(folder: Path) -> Path:
    path = folder / "half.db"
    with sqlite3.connect(path) as database:
        database.execute("create table trials (number integer, words text)")
        database.executemany("insert into trials values (?, ?)", [(i, "x" * 500) for i in range(500)])
    path.write_bytes(path.read_bytes()[:9000])
    return path


BASE = {"kind": "flow_matching", "name": "base", "resolution": 32, "num_images": 8, "batch_size": 4}


def train(folder: Path, names: str = "recipe.yaml", **changes: object) -> Case:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"architecture": "snapgen-emoji", "stages": [BASE], **changes}))
    return ["train", str(path)], names


def halving(folder: Path, names: str = "recipe.yaml", **changes: object) -> Case:
    """A recipe of step distillation by a teacher that predicts something else, or with what is changed."""
    teacher = folder / "net"
    teacher.mkdir()
    config = {"arch": preset("sd15-emoji").model_dump(mode="json"), "prediction_type": "noise"}
    (teacher / "config.json").write_text(json.dumps(config))
    stage = {**BASE, "kind": "progressive", "teacher": str(teacher), **changes}
    return train(folder, names, architecture="sd15-emoji", prediction_type="v", stages=[stage])


NO_UP = b'{"down": [{"channels": 64}], "up": []}'

CASES: dict[str, Callable[[Path], Case]] = {
    # A study's file
    "study missing": lambda f: (["search", str(f / "none.yaml")], "none.yaml"),
    "study neither name nor file": lambda _: (["search", "emojy"], "emojy"),
    "study a folder": lambda f: (["search", str(f)], f.name),
    "study empty": lambda f: study(f, ""),
    "study binary": lambda f: (["search", str(written(f / "s.yaml", b"\x80\x04\xff"))], "s.yaml"),
    "study huge": lambda f: study(f, "#" * (MAX_FILE_BYTES + 1)),
    "study a list": lambda f: study(f, "- space: emoji"),
    "study truncated": lambda f: study(f, "space: emoji\nprotocol: {steps: 2, sam"),
    "study unknown key": lambda f: study(f, trails=3),
    "study key twice": lambda f: study(f, "space: emoji\ntrials: 1\nspace: emoji\n"),
    "study trials in words": lambda f: study(f, trials="many"),
    "study trials negative": lambda f: study(f, trials=-1),
    "study no budget": lambda f: study(f, trials=None),
    "study no workers": lambda f: study(f, workers=0),
    "study unknown sampler": lambda f: study(f, sampler="anneal"),
    "study bad sampler option": lambda f: study(f, sampler={"name": "tpe", "options": {"n_startup": 3}}),
    "study unknown objective": lambda f: study(f, objectives=["beauty"]),
    "study objective twice": lambda f: study(f, objectives=["params", "params"]),
    "study no objective": lambda f: study(f, objectives=[]),
    "study unknown limit": lambda f: study(f, constraints={"weight": 1}),
    "study limit NaN": lambda f: study(f, constraints={"params": float("nan")}),
    "study limit negative": lambda f: study(f, constraints={"latency_ms": -3}),
    "study name a path": lambda f: study(f, name="../up"),
    "study seed too large": lambda f: study(f, seed=1 << 70),
    "study unknown device": lambda f: (
        study(f, latency={"device": "abacus"})[0],
        "study.yaml: latency.device: unknown device",
    ),
    "study no threads": lambda f: study(f, latency={"threads": 0}),
    "study unknown space": lambda f: study(f, space="emojis"),
    "protocol unknown key": lambda f: protocol(f, step=3),
    "protocol steps a float": lambda f: protocol(f, steps=2.5),
    "protocol seeds twice": lambda f: protocol(f, train_seeds=[1, 1]),
    "protocol too few samples": lambda f: protocol(f, num_samples=3),
    "protocol rate infinite": lambda f: protocol(f, learning_rate=float("inf")),
    # A space's file
    "proxy missing": lambda f: study(f, proxy="emojis"),
    "proxy with other knobs": lambda f: (study(f, proxy="emoji-large")[0], "knobs.levels[1].transformer_depth"),
    "proxy of a study that trains nothing": lambda f: study(f, proxy="emoji", objectives=["params"]),
    "proxy of an ablation": lambda f: (ablation(f, proxy="emoji")[0], "proxy cannot be combined with ablation"),
    "space missing": lambda f: (["space", "show", str(f / "none.yaml")], "none.yaml"),
    "space empty": lambda f: space(f, " \n"),
    "space binary": lambda f: (["space", "show", str(written(f / "s.yaml", b"\xff" * 99))], "s.yaml"),
    "space a text": lambda f: space(f, "words"),
    "space no base": lambda f: space(f, without("base", SPACE)),
    "space unknown base": lambda f: space(f, base="snapgem"),
    "space bad base": lambda f: space(f, base={"down": [{"channels": 16}], "up": []}),
    "space unknown key": lambda f: space(f, limit={"params": 1}),
    "space unknown field": lambda f: knobs(f, **{"stages[0].chanels": [16, 32]}),
    "space no such stage": lambda f: knobs(f, **{"levels[7].channels": [16, 32]}),
    "space no knobs": lambda f: space(f, knobs={}),
    "space one choice": lambda f: knobs(f, qk_norm=[True]),
    "space choice twice": lambda f: knobs(f, qk_norm=[True, True]),
    "space choice of wrong type": lambda f: knobs(f, rope=[False, "maybe"]),
    "space choice that never fits": lambda f: knobs(f, **{"levels[1].channels": [32, 33]}),
    "space two knobs for one field": lambda f: knobs(f, **{"down[0].num_res_blocks": [1, 2]}),
    "space unknown limit": lambda f: space(f, constraints={"parms": 3}),
    "space limit in words": lambda f: space(f, constraints={"params": "small"}),
    "space reference to unknown knob": lambda f: space(f, references={"best": {"conv": "a"}}),
    "space reference to unknown choice": lambda f: space(f, references={"best": {"convs": "c"}}),
    "space latent odd": lambda f: space(f, latent=9),
    "space aliases in its base": lambda f: space(f, f"{MULTIPLIED}\nbase: *l8\nlatent_size: 8\nknobs: {{a: [1, 2]}}"),
    "space aliases in a choice": lambda f: space(
        f, f"{MULTIPLIED}\nbase: snapgen-emoji\nlatent_size: 8\nknobs: {{a: {{b: *l8, c: {{rope: true}}}}}}"
    ),
    "space a named pipe": lambda f: (os.mkfifo(f / "s.yaml"), (["space", "show", str(f / "s.yaml")], "s.yaml"))[1],
    "space without end": lambda f: (
        (f / "s.yaml").symlink_to("/dev/zero"),
        (["space", "show", str(f / "s.yaml")], "s.yaml"),
    )[1],
    # Data
    "data with a caption that is a pipe": lambda f: (
        folder_of(f, "images", a_png=image_bytes(), b_png=image_bytes()),
        os.mkfifo(f / "images" / "a.txt"),
        data(f, "images"),
    )[2],
    "data of images without end": lambda f: (
        folder_of(f, "images"),
        (f / "images" / "a.png").symlink_to("/dev/zero"),
        os.mkfifo(f / "images" / "b.png"),
        data(f, "images"),
    )[3],
    "data missing": lambda f: data(f, "none"),
    "data an empty folder": lambda f: folder_of(f, "images"),
    "data a folder of no images": lambda f: folder_of(f, "images", notes_txt=b"hello"),
    "data all corrupt": lambda f: folder_of(f, "images", a_png=image_bytes()[:40], b_png=b"", c_png=b"\x00" * 50),
    "data a text named tar": lambda f: data(f, written(f / "shard.tar", b"no tar at all\n" * 99).name),
    "data an empty tar": lambda f: shard(f, entries=0),
    "data a truncated tar": lambda f: shard(f, keep=300),
    "data an empty file": lambda f: data(f, written(f / "shard.tar", b"").name),
    # What the protocol names
    "extractor missing": lambda f: extractor(f, None),
    "extractor empty": lambda f: extractor(f, b""),
    "extractor text": lambda f: extractor(f, b"weights"),
    "extractor truncated": lambda f: extractor(f, saved({"a": torch.ones(999)})[:700]),
    "extractor of other weights": lambda f: extractor(f, saved({"a": torch.ones(9)})),
    "extractor no tensors": lambda f: extractor(f, saved([1, 2])),
    "extractor malicious": lambda f: extractor(f, pickle.dumps(Malicious())),
    "extractor a folder": lambda f: (protocol(f, feature_extractor=str(f))[0], f.name),
    "autoencoder missing": lambda f: (protocol(f, autoencoder=str(f / "vae"))[0], "vae"),
    "autoencoder a file": lambda f: (protocol(f, autoencoder=str(written(f / "vae", b"x")))[0], "vae"),
    "text encoder missing": lambda f: (protocol(f, text_encoder=str(f / "bert"))[0], "bert"),
    "protocol does not fit the space": lambda f: protocol(f, resolution=20),
    # Rungs
    "rungs none": lambda f: rungs(f, "study.yaml: rungs.steps"),
    "rungs no steps": lambda f: rungs(f, "study.yaml: rungs.steps", "early", 120),
    "rungs before the first step": lambda f: rungs(f, "study.yaml: rungs.steps: a rung at step 0", 0, 4),
    "rungs in no order": lambda f: rungs(f, "study.yaml: rungs.steps: 2 follows 4", 4, 2),
    "rungs after the end": lambda f: rungs(f, "rungs.steps has 8, but protocol.steps is 8", 4, 8),
    "rungs of several seeds": lambda f: rungs(f, "give seeds: {first: 1}", 4, protocol={"train_seeds": [0, 1]}),
    "rungs without quality": lambda f: rungs(f, "one quality objective", 4, objectives=["latency_ms", "params"]),
    # An ablation
    "ablation wrong row name": lambda f: (ablation(f, over="zero")[0], "'zero' is not an earlier row"),
    "ablation wrong final row": lambda f: (ablation(f, final="2c")[0], "'2c' is not a row after the base"),
    "ablation unknown knob": lambda f: (ablation(f, {"all.colour": 3})[0], "ablation.rows.1.overrides.all.colour"),
    "ablation value of wrong type": lambda f: (ablation(f, {"all.ffn_ratio": "x"})[0], "overrides.all.ffn_ratio"),
    "ablation contradictory row": lambda f: (ablation(f, {"all.expansion": 2})[0], "overrides.all.expansion"),
    "ablation row that changes nothing": lambda f: (ablation(f, {"qk_norm": False})[0], "same net as row 0"),
    "ablation row that does not fit": lambda f: (ablation(f, {"levels[1].channels": 33})[0], "ablation.rows.1"),
    "ablation changes a list": lambda f: (ablation(f, ["qk_norm"])[0], "overrides"),
    "ablation too few seeds": lambda f: (ablation(f, protocol={"train_seeds": [0, 1]})[0], "protocol.train_seeds"),
    "ablation unknown quality": lambda f: ([*ablation(f)[0], "--quality", "beauty"], "beauty"),
    "ablation other form of table": lambda f: ([*ablation(f)[0], "--out", str(f / "table.pdf")], "table.pdf"),
    "ablation no ImageNet": lambda _: (
        ["ablate", "snapgen", "--quality", "frechet_distance"],
        "data/imagenet",
    ),
    "ablation wrong weights": lambda f: of_weights(f, saved({"a": torch.ones(9)})),
    "ablation of no rows": lambda _: (["ablate", "search/emoji"], "ablation"),
    "search of an ablation": lambda f: (["search", ablation(f)[0][1]], "archsearch ablate"),
    # Storage
    "storage no URL": lambda f: storage(f, "somewhere", "somewhere"),
    "storage unknown dialect": lambda f: storage(f, "oracle9://x/y", "oracle9"),
    "storage a folder": lambda f: storage(f, f"sqlite:///{f}", f.name),
    "storage in no folder": lambda f: storage(f, f"sqlite:///{written(f / 'file', b'')}/study.db", "file"),
    "storage not a database": lambda f: storage(f, f"sqlite:///{written(f / 'a.db', b'text' * 999)}", "a.db"),
    "storage truncated": lambda f: storage(f, f"sqlite:///{half_database(f)}", "half.db"),
    "storage nobody answers": lambda f: storage(f, "postgresql+psycopg://me:secret@127.0.0.1:9/none", "127.0.0.1"),
    # Other commands
    "report not begun": lambda f: (["report", study(f)[0][1]], "study.db"),
    "best not begun": lambda f: (["best", study(f)[0][1]], "study.db"),
    "cost unknown architecture": lambda _: (["cost", "tiny-decodr"], "tiny-decoder"),
    "cost a file that is missing": lambda f: (["cost", str(f / "none.json")], "none.json"),
    "cost a bad architecture": lambda f: (
        ["cost", str(written(f / "a.json", b'{"down": [{"channels": 64}], "up": []}'))],
        "a.json",
    ),
    "cost a huge architecture": lambda f: (
        [
            "cost",
            str(
                written(f / "a.json", b'{"latent_channels": 1e15, "down": [{"channels": 8}], "up": [{"channels": 8}]}')
            ),
        ],
        "latent_channels",
    ),
    "cost latent not halved": lambda _: (["cost", "snapgen-t2i", "--latent-size", "30"], "multiple of 4"),
    "cost latent too large": lambda _: (["cost", "tiny-decoder", "--latent-size", "5000"], "--latent-size"),
    "cost no such reference": lambda _: (["cost", "emoji/bse"], "no reference 'bse'"),
    "cost of a study not begun": lambda _: (["cost", "emoji:best"], "run archsearch search first"),
    "cost no tokens": lambda _: (["cost", "snapgen-t2i", "--context-tokens", "0"], "--context-tokens"),
    "score unknown architecture": lambda _: (["score", "snapgenius"], "snapgenius"),
    "score a bad architecture": lambda f: (
        ["score", str(written(f / "a.json", b'{"down": [{"channels": 64}], "up": []}'))],
        "a.json",
    ),
    "score an architecture that does not fit": lambda _: (["score", "snapgen-baseline"], "latent_channels"),
    "score a net without a twin": lambda f: (
        ["score", "snapgen-emoji", "--study", study(f, proxy="emoji")[0][1]],
        "snapgen-emoji has no twin in emoji",
    ),
    # Trained runs
    "generate no run": lambda f: (["generate", str(f / "none"), "a fox", "--out", "a.png"], "none"),
    "generate an unfinished run": lambda f: (generate(f)[0], "model_index.json"),
    "generate no prompt": lambda f: (["generate", str(f), "--out", "a.png"], "prompts"),
    "generate a damaged run": lambda f: generate(f, b"{"),
    "generate a run of other classes": lambda f: generate(f, b'{"_class_name": "X", "unet": ["y", "Z"]}'),
    "generate no image's name": lambda f: ([*generate(f)[0][:3], "--out", "a.pdf"], "a.pdf"),
    "generate into a file": lambda f: ([*generate(f)[0][:3], "--out", str(written(f / "x", b"") / "a.png")], "x"),
    "generate a damaged run into a new folder": lambda f: (
        [*generate(f, b"{")[0][:3], "--out", str(f / "new" / "a.png")],
        "run",
    ),
    "generate no size": lambda f: ([*generate(f)[0], "--size", "big"], "big"),
    "generate no steps": lambda f: ([*generate(f)[0], "--steps", "0"], "--steps"),
    "export no run": lambda f: (["export", str(f / "none"), "--to", "coreml"], "none"),
    "export a damaged run into a new folder": lambda f: (
        ["export", generate(f, b"{")[0][1], "--to", "coreml", "--out", str(f / "new" / "coreml")],
        "run",
    ),
    "convert no net": lambda f: (["convert", str(f / "none"), "--out", str(f / "new" / "net")], "none"),
    "convert into a file": lambda f: (["convert", str(f), "--out", str(written(f / "x", b"") / "net")], "x/net"),
    "latency sample of no device": lambda f: (
        ["latency", "sample", "emoji", "--out", str(f / "r.jsonl"), "--device", "abacus"],
        "abacus",
    ),
    "export to something else": lambda f: (["export", str(f), "--to", "onnx"], "onnx"),
    "export a damaged run": lambda f: (["export", generate(f, b"{")[0][1], "--to", "coreml"], "run"),
    "export both weights": lambda f: (
        ["export", generate(f)[0][1], "--to", "coreml", "--int8", "--palette-bits", "4"],
        "palette",
    ),
    # A training
    # Networks that evolve
    "evolve no such study": lambda f: (["evolve", str(f / "none.yaml")], "none.yaml"),
    "evolve what is searched": lambda _: (["evolve", "search/emoji"], "emoji.yaml"),
    "search what evolves": lambda f: (["search", evolving(f)[0][1]], "study.yaml: evolve"),
    "evolve bad probability": lambda f: evolving(f, "evolve.block_dropout", evolve={"block_dropout": 1.5}),
    "evolve no target": lambda f: evolving(f, "give a target", evolve={"target_ms": 0}),
    "evolve unknown metric": lambda f: evolving(f, "evolve.metric", evolve={"metric": "beauty"}),
    "evolve several seeds": lambda f: evolving(f, "protocol.train_seeds", protocol={"steps": 2, "num_samples": 8}),
    "evolve missing weights": lambda f: evolving(
        f, "nowhere", protocol={"steps": 2, "num_samples": 8, "train_seeds": [0], "init_from": str(f / "nowhere")}
    ),
    "evolve missing teacher": lambda f: evolving(
        f,
        "nowhere",
        protocol={"steps": 2, "num_samples": 8, "train_seeds": [0], "distillation": {"teacher": str(f / "nowhere")}},
    ),
    "evolve bad accumulation": lambda f: evolving(
        f, "gradient_accumulation_steps", protocol={"train_seeds": [0], "gradient_accumulation_steps": 5}
    ),
    "train bad block dropout": lambda f: train(f, stages=[{**BASE, "block_dropout": 1}]),
    "train no recipe": lambda f: (["train", str(f / "none.yaml")], "none.yaml"),
    "train no stages": lambda f: train(f, stages=[]),
    "train unknown key": lambda f: train(f, stagse=[]),
    "train missing data": lambda f: train(f, f"recipe.yaml: data: {f}/pictures", data=str(f / "pictures")),
    "train corrupt data": lambda f: train(
        f, "recipe.yaml: data: ", data=str(f / folder_of(f, "pictures", a_png=b"x")[1])
    ),
    "train missing weights": lambda f: train(f, "recipe.yaml: init_weights: ", init_weights=str(f / "gone")),
    "train missing architecture": lambda f: train(f, "recipe.yaml: architecture: nosuch", architecture="nosuch:best"),
    "train missing autoencoder": lambda f: train(f, f"recipe.yaml: autoencoder: {f}/vae", autoencoder=str(f / "vae")),
    "train missing text encoder": lambda f: train(
        f, f"recipe.yaml: text_encoders: {f}/clip", text_encoders=[{"encoder": str(f / "clip")}]
    ),
    "train missing teacher": lambda f: train(
        f,
        f"recipe.yaml: teacher.path: {f}/sd3",
        teacher={"path": str(f / "sd3")},
        stages=[{**BASE, "distillation": {}}],
    ),
    "train resolution that does not fit": lambda f: train(
        f, "stages[0].resolution", stages=[{**BASE, "resolution": 36}]
    ),
    "train a study of no trials": lambda f: ([*train(f)[0], "--architecture", "nosuchstudy:best"], "nosuchstudy"),
    "halving by a teacher of another prediction": lambda f: halving(f, "net: predicts 'noise'"),
    "halving by a teacher that is missing": lambda f: halving(
        f, f"recipe.yaml: stages[0].teacher: {f}/gone: is not a folder", teacher=str(f / "gone")
    ),
    "halving with a bad probability": lambda f: halving(f, "stages[0].cfg_probability", cfg_probability=1.2),
    "halving with a bad range of guidance": lambda f: halving(f, "cfg_range [9, 2] is not 0", cfg_range=[9, 2]),
    "halving of odd steps": lambda f: halving(f, "teacher_steps 9 is odd", teacher_steps=9),
    "train bad seed": lambda f: ([*train(f)[0], "--seed", "-3"], "--seed"),
    "train bad name": lambda f: ([*train(f)[0], "--name", "../up"], "../up"),
    "train to no stage": lambda f: ([*train(f)[0], "--stop-after", "end"], "--stop-after"),
    "plan missing data": lambda f: ([*train(f, data=str(f / "pictures"))[0], "--dry-run"], "recipe.yaml: data: "),
    "compare into a folder": lambda f: (["compare-recipes", "distillation", "--out", str(f)], f"--out: {f}"),
    "audit into another form": lambda f: (["audit", "emoji", "--out", str(f / "audit.pdf")], "audit.pdf"),
    "report into a file's folder": lambda f: (
        ["report", "emoji", "--out", str(written(f / "x", b"") / "page.html")],
        "x/page.html",
    ),
    "audit of what was not trained": lambda f: (
        ["audit", study(f, objectives=["params", "macs"])[0][1]],
        "study.yaml: objectives",
    ),
    "unknown command": lambda _: (["serach"], "serach"),
    "unknown option": lambda _: (["search", "emoji", "--fast"], "--fast"),
    "option of wrong type": lambda _: (["search", "emoji", "--trials", "x"], "--trials"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_status_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, names = CASES[name](tmp_path)
    given = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["archsearch", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("archsearch: ")
    assert names in err
    assert "; " in err, "a remedy follows the problem"
    assert "secret" not in err
    assert out == ""
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - set(given)
    assert not {path for path in left if path.suffix != ".db" and "study.db-" not in path.name}, "half-written files"
    made = {path for path in tmp_path.rglob("*") if path.is_dir()} - folders
    assert not {path for path in made if path.relative_to(tmp_path).parts[0] != "runs"}, "empty folders"
    assert all(path.read_bytes() == content for path, content in given.items()), "the user's files are untouched"


def test_there_are_sixty() -> None:
    assert len(CASES) >= 60

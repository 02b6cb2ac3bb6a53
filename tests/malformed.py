"""Generator of malformed inputs, and the program that gives them to the command line in one process.

python -m tests.malformed 300     # a line of JSON for each: what was given, and how it ended
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import resource
import signal
import sqlite3
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

SEED = 18
LEVEL = {"channels": 16, "num_res_blocks": 1}
ARCHITECTURE: dict[str, Any] = {
    "latent_channels": 4,
    "context_dim": 384,
    "norm_groups": 8,
    "time": {"embed_dim": 64, "hidden_dim": 128},
    "down": [LEVEL, {"channels": 32, "num_res_blocks": 1, "num_transformers": 1, "head_dim": 8, "ffn_ratio": 2.5}],
    "mid": {"num_res_blocks": 2, "num_transformers": 1, "head_dim": 8, "conv": "separable"},
    "up": [LEVEL, {"channels": 32, "layers": [[1, 0], [1, 1]], "head_dim": 8}],
}
SPACE: dict[str, Any] = {
    "latent_size": 8,
    "context_tokens": 16,
    "base": ARCHITECTURE,
    "knobs": {"all.ffn_ratio": [2, 4], "convs": {"a": {"mid.conv": "standard"}, "b": {"mid.conv": "separable"}}},
    "constraints": {"params": 1e9},
    "references": {"thin": {"convs": "a"}},
}
STUDY: dict[str, Any] = {
    "space": "emoji",
    "objectives": ["validation_loss", "latency_ms"],
    "constraints": {"params": 1e9},
    "sampler": {"name": "tpe", "options": {"n_startup_trials": 3}},
    "seed": 1,
    "trials": 1,
    "workers": 1,
    "latency": {"device": "host", "threads": 1},
    "protocol": {"steps": 2, "num_samples": 8, "batch_size": 4, "learning_rate": 0.01, "train_seeds": [0, 1]},
}
RECIPE: dict[str, Any] = {
    "architecture": "snapgen-emoji",
    "data": "emoji",
    "seed": 0,
    "stages": [
        {"kind": "flow_matching", "name": "base", "resolution": 32, "num_images": 8, "batch_size": 4},
        {"kind": "decoder", "name": "small", "images": 8},
    ],
}
FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "architecture": (ARCHITECTURE, ["cost", "FILE"]),
    "space": (SPACE, ["space", "show", "FILE"]),
    "study": (STUDY, ["search", "FILE"]),
    "recipe": (RECIPE, ["train", "FILE"]),
}
"""Valid files of every kind, and the command that reads them."""

NUMBERS = [-(10**9), math.nan, math.inf, -math.inf, 10**40, -(10**400), "many", [1], {"a": 1}, "1e999", [[]]]
TEXTS = [[], {}, [1, 2], 3.5, {"a": {"b": None}}, -7, [["deep"]]]
LISTS = ["text", {"a": 1}, 7, -0.5, [[[[[]]]]], [None, {}], [math.nan]]
MAPPINGS = ["no such name", [1], 7, {"unknown": 1}, [{}], {"": {}}, {"é": [None]}]
BROKEN = [
    "key: 'without end",
    "\t- tabs: [",
    "{{{{{{",
    "a: b: c",
    "*nowhere",
    "a: &a [*a, *a]",
    "!!python/object/apply:os.system [true]",
    "!!binary: x",
    "? [a, list]\n: as a key",
    "%YAML 9.9",
    "a: \x07",
    'a: "\\e[31m"',
    "a: " + "[" * 3000,
    "a: " + "9" * 5000,
    "a: 1" + ":59" * 3000,
    "a: !!timestamp later",
    "- 1\nb: 2",
    "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else '1'] * 10)}]" for i in range(12)),
]
"""Lines that no YAML file of ours has."""

URLS = ["", "://", "sqlite", "sqlite:///{x}", "sqlite:////dev/zero", "sqlite:///\x00", "nosuch://a/b", "postgresql://"]
URLS += [f"sqlite:///{'a/' * 500}x.db", "mysql://u:s3cret@", "sqlite:///..", "http://localhost/x", "é" * 99]

Case = tuple[str, Callable[[Path], list[str]]]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


def changed(rng: random.Random, valid: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Data with one value that cannot be, or with an unknown key."""
    values = deepcopy(valid)
    path = rng.choice(list(leaves(values)))
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    pool = {dict: MAPPINGS, list: LISTS, str: TEXTS}.get(type(old), NUMBERS)
    new = rng.choice(pool)
    if isinstance(parent, dict) and rng.random() < 0.2:
        parent[rng.choice(["unknown", "", "née", "a\nb", "x" * 300])] = new
    else:
        parent[path[-1]] = new
    return ".".join(map(str, path)), values


def written(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def yaml_case(rng: random.Random) -> Case:
    kind = rng.choice(list(FILES))
    valid, command = FILES[kind]
    what = rng.choice(["value", "value", "value", "line", "line", "bytes", "cut", "special"])
    text = yaml.safe_dump(valid)
    if what == "value":
        place, values = changed(rng, valid)
        name, content = f"{kind}: {place}", yaml.safe_dump(values).encode()
    elif what == "line":
        lines, line = text.splitlines(), rng.choice(BROKEN)
        lines.insert(rng.randrange(len(lines) + 1), line)
        name, content = f"{kind}: {line[:30]!r}", "\n".join(lines).encode()
    elif what == "bytes":
        at, noise = (
            rng.randrange(len(text)),
            rng.choice([b"\xff\xfe", b"\x80", b"\0", b"\xed\xa0\x80", rng.randbytes(99)]),
        )
        name, content = f"{kind}: bytes", text[:at].encode() + noise + b"\xff" + text[at:].encode()
    elif what == "cut":
        name, content = f"{kind}: cut", text.encode()[: rng.randrange(12)]
    else:
        return f"{kind}: no file", lambda folder: [*command[:-1], special(rng, folder / "file.yaml")]
    return name, lambda folder: [*command[:-1], written(folder / "file.yaml", content)]


def special(rng: random.Random, path: Path) -> str:
    """Something that is not a file."""
    how = rng.choice(["pipe", "zeros", "folder", "loop", "nothing", "huge"])
    if how == "pipe":
        os.mkfifo(path)
    elif how == "zeros":
        path.symlink_to("/dev/zero")
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    return str(path)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def damaged_weights(rng: random.Random) -> bytes:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return rng.choice(
        [
            lambda: rng.randbytes(rng.randrange(200)),
            lambda: struct.pack("<Q", 1 << rng.randrange(20, 63)) + b"{",
            lambda: safetensors({"a": {**tensor, "shape": [1 << 40, 1 << 40]}}, bytes(8)),
            lambda: safetensors({"a": {**tensor, "data_offsets": [0, 1 << 60]}}, bytes(8)),
            lambda: safetensors({"a": {**tensor, "dtype": rng.choice(["F999", "", 3])}}, bytes(8)),
            lambda: safetensors(b"[" * rng.randrange(1, 5000)),
            lambda: safetensors({f"w{i}": {**tensor, "shape": [0], "data_offsets": [0, 0]} for i in range(3000)}),
            lambda: safetensors({"conv_in.weight": tensor}, struct.pack("<2f", math.nan, 1)),
            lambda: safetensors({"__metadata__": {"a": "b" * (1 << 22)}}),
        ]
    )()


NET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def checkpoint_case(rng: random.Random) -> Case:
    config = changed(rng, NET)[1] if rng.random() < 0.5 else NET
    text = json.dumps(config) if rng.random() < 0.8 else rng.choice(["{", "[" * 99_999, "9" * 9999, '{"a": 1e999}', ""])
    weights = damaged_weights(rng)
    index = rng.choice(
        [None, {"a": "../../etc/passwd"}, {"a": ".."}, {"a": "/dev/zero"}, {"a": 3}, "w", {"a": "b\n.st"}]
    )
    name = "diffusion_pytorch_model.safetensors"

    def make(folder: Path) -> list[str]:
        written(folder / "net" / "config.json", text.encode())
        if index is None:
            written(folder / "net" / name, weights)
        else:
            written(folder / "net" / f"{name}.index.json", json.dumps({"weight_map": index}).encode())
        return ["convert", str(folder / "net"), "--out", str(folder / "out")]

    def pickled(folder: Path) -> list[str]:
        content = rng.choice([weights, b"\x80\x04" + weights, b"PK\x03\x04" + weights, b"garbage\x00" * 99])
        path = written(folder / "inception.pth", content)
        protocol = {**STUDY["protocol"], "feature_extractor": path}
        return ["search", written(folder / "study.yaml", yaml.safe_dump({**STUDY, "protocol": protocol}).encode())]

    return ("weights", make) if rng.random() < 0.8 else ("pickle", pickled)


def png(width: int, height: int) -> bytes:
    """A PNG file whose header claims a size that its data do not have."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64)))


def picture(rng: random.Random) -> bytes:
    return rng.choice(
        [rng.randbytes(300), b"", png(8, 8), png(9000, 9000), png(1 << 30, 1 << 30), b"GIF89a", b"\xff\xd8"]
    )


def shard(rng: random.Random) -> bytes:
    """An archive without a usable image."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(rng.randrange(4)):
            suffix = rng.choice(["png", "jpg", "txt", "json", "\x1b[31m.png", "../../x.png", "gif", "webp"])
            info, content = tarfile.TarInfo(f"{number}.{suffix}"), picture(rng)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = file.getvalue()
    kind = rng.choice(["whole", "cut", "claims", "noise", "packed", "packed", "bomb", "bomb cut"])
    if kind == "whole":
        return content
    if kind == "cut":
        return content[: rng.randrange(600)]
    if kind == "claims":
        info = tarfile.TarInfo("a.png")
        info.size = 1 << 40
        return info.tobuf() + bytes(1024)
    if kind == "noise":
        return rng.randbytes(rng.randrange(5000))
    pack = zlib.compressobj(6, zlib.DEFLATED, 31)
    if kind == "packed":
        return pack.compress(content) + pack.flush()
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 33
    packed = pack.compress(info.tobuf()) + b"".join(pack.compress(bytes(1 << 22)) for _ in range(80)) + pack.flush()
    return packed[: len(packed) // 2] if kind == "bomb cut" else packed


def data_case(rng: random.Random) -> Case:
    as_folder = rng.random() < 0.4
    content, images = shard(rng), [picture(rng) for _ in range(rng.randrange(4))]
    captions = [rng.choice([b"\xff\xfe\x00", b"{", b"[" * 9999, b"9" * 9999, b"a"]) for _ in images]
    suffix = rng.choice([".tar", ".tar.gz"]) if content[:2] != b"\x1f\x8b" else ".tar.gz"

    def make(folder: Path) -> list[str]:
        path = folder / "data"
        if as_folder:
            path.mkdir()
            for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
                written(path / f"{number}.png", image)
                written(path / f"{number}{rng.choice(['.txt', '.json', '.csv'])}", caption)
            if rng.random() < 0.3:
                special(rng, path / "z.png")
        else:
            path = Path(written(folder / f"data{suffix}", content))
        values = {**STUDY, "protocol": {**STUDY["protocol"], "data": str(path)}}
        return ["search", written(folder / "study.yaml", yaml.safe_dump(values).encode())]

    return ("folder" if as_folder else "shard"), make


def storage_case(rng: random.Random) -> Case:
    kind = rng.choice(["noise", "text", "foreign", "url", "special", "header"])
    noise = rng.randbytes(rng.randrange(1, 9000))
    url = rng.choice(URLS)

    def make(folder: Path) -> list[str]:
        path = folder / "study.db"
        if kind == "foreign":
            with contextlib.closing(sqlite3.connect(path)) as database, database:
                database.execute(f"create table {rng.choice(['a', 'trials', 'bookmarks'])} (x text)")
        elif kind == "special":
            special(rng, path)
        elif kind != "url":
            starts = {"text": b"not a database\n" * 99, "header": b"SQLite format 3\0" + noise}
            written(path, starts.get(kind, b"\1" + noise))
        study = written(folder / "study.yaml", yaml.safe_dump(STUDY).encode())
        return [
            rng.choice(["best", "report"]),
            study,
            "--storage",
            url or "x" if kind == "url" else f"sqlite:///{path}",
        ]

    return f"storage: {kind}", make


def cases(count: int) -> Iterator[Case]:
    """So many malformed inputs, always the same."""
    kinds = [yaml_case, yaml_case, yaml_case, checkpoint_case, data_case, storage_case]
    for number in range(count):
        rng = random.Random(f"{SEED} {number}")
        yield kinds[number % len(kinds)](rng)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder; of large files the beginning."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.open("rb").read(1 << 20) if regular else None
    return found


def peak_megabytes() -> float:
    """Largest memory since the last call of `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def give(make: Callable[[Path], list[str]]) -> dict[str, Any]:
    """Give one input to the command line, in a folder of its own."""
    from archsearch import cli

    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        arguments = make(Path(name))
        before = contents(Path(name))
        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["archsearch", *arguments]
        reset_peak()
        begun, status = time.process_time(), "none"
        signal.alarm(60)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as ended:
            status = str(ended.code)
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        after = contents(Path(name))
    return {
        "arguments": arguments,
        "status": status,
        "err": err.getvalue(),
        "seconds": time.process_time() - begun,
        "megabytes": peak_megabytes(),
        "written": sorted(key for key in before.keys() | after.keys() if before.get(key, 0) != after.get(key, 0)),
    }


def stop(*_: object) -> None:
    raise TimeoutError("60 seconds")


def import_all() -> None:
    """Import what the commands import, so that no input is charged with it."""
    import optuna.storages
    import transformers

    import snapgen.conversion.from_diffusers  # noqa: F401

    assert transformers.AutoTokenizer
    assert optuna.storages.RDBStorage


def main() -> None:
    """Print a line for each input."""
    import_all()
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    signal.signal(signal.SIGALRM, stop)
    os.environ["ARCHSEARCH_CACHE"] = tempfile.mkdtemp()
    for number, (name, make) in enumerate(cases(int(sys.argv[1]))):
        print(json.dumps({"number": number, "name": name, **give(make)}), flush=True)


if __name__ == "__main__":
    main()

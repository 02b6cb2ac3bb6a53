"""Mistakes in a space's file: each error is one line with the file, the location and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from archsearch.spaces.loading import load_space
from snapgen.errors import InputError

BASE = """
latent_size: 8
base:
  norm_groups: 8
  down:
    - {channels: 32, head_dim: 16}
    - {channels: 48, head_dim: 16, num_transformers: 2}
  mid: {head_dim: 16}
  up:
    - {channels: 32, head_dim: 16}
    - {channels: 48, head_dim: 16, num_transformers: 2}
"""

GOOD = f"""{BASE}
knobs:
  qk_norm: [false, true]
  convs:
    plain: {{}}
    separable: {{all.conv: separable}}
constraints: {{params: 2.5e6}}
references:
  both: {{qk_norm: true, convs: separable}}
"""

MISTAKES = {
    # knobs
    "no knobs": ("knobs: {}", "knobs", "at least 1"),
    "knobs missing": ("", "knobs", "required"),
    "knobs a list": ("knobs: [qk_norm]", "knobs", "['qk_norm'] is not a mapping"),
    "unknown part": (
        "knobs: {stage.conv: [standard, separable]}",
        "knobs.stage.conv",
        "unknown part 'stage'; use down",
    ),
    "unknown field": ("knobs:\n  down[0].width: [8, 16]", "knobs.down[0].width", "unknown field 'width'"),
    "no such level": ("knobs:\n  down[2].channels: [8, 16]", "knobs.down[2].channels", "none of the 2 levels"),
    "not a path": ("knobs: {convs: [standard, separable]}", "knobs.convs", "not a knob"),
    "no choices": ("knobs: {qk_norm: []}", "knobs.qk_norm", "no choices"),
    "one choice": ("knobs: {qk_norm: [true]}", "knobs.qk_norm", "a single choice; give it at least two"),
    "one label": ("knobs: {x: {a: {qk_norm: true}}}", "knobs.x", "a single choice"),
    "not a list": ("knobs: {qk_norm: true}", "knobs.qk_norm", "must be a list of choices, or labels"),
    "number for a flag": ("knobs: {qk_norm: [0, 1]}", "knobs.qk_norm[0]", "0 is neither true nor false"),
    "flag for a number": (
        "knobs: {mid.num_res_blocks: [2, true]}",
        "knobs.mid.num_res_blocks[1]",
        "true is not a whole number",
    ),
    "text for a number": ("knobs: {all.ffn_ratio: [4, '3']}", "knobs.all.ffn_ratio[1]", "'3' is not a number"),
    "fraction": ("knobs: {mid.num_res_blocks: [2, 1.5]}", "knobs.mid.num_res_blocks[1]", "1.5 is not a whole number"),
    "unknown word": (
        "knobs: {all.conv: [standard, fancy]}",
        "knobs.all.conv[1]",
        "'fancy' is not one of the choices; use one of: 'standard' or 'separable'",
    ),
    "not a number": ("knobs: {all.ffn_ratio: [4, .nan]}", "knobs.all.ffn_ratio[1]", "nan is not"),
    "a list for a number": ("knobs: {all.ffn_ratio: [4, [3]]}", "knobs.all.ffn_ratio[1]", "[3] is not a number"),
    "too large": ("knobs: {all.ffn_ratio: [4, 99]}", "knobs.all.ffn_ratio[1]", "99 is too large; write 16.0 or less"),
    "twice": ("knobs: {qk_norm: [true, false, true]}", "knobs.qk_norm[2]", "true is listed twice; remove one"),
    "twice as number": ("knobs: {all.ffn_ratio: [4, 4.0]}", "knobs.all.ffn_ratio[1]", "listed twice"),
    "same effect": (
        "knobs:\n  x: {a: {all.rope: true}, b: {rope: true}}".replace("all.rope", "rope"),
        "knobs.x.b",
        "changes the same fields to the same values as 'a'",
    ),
    "label not text": ("knobs: {x: {off: {}, on: {rope: true}}}", "knobs.x", "false is not text; put it in quotes"),
    "changes not a mapping": ("knobs: {x: {a: {}, b: rope}}", "knobs.x.b", "must map paths to values"),
    "wrong value under a label": ("knobs: {x: {a: {}, b: {rope: 1}}}", "knobs.x.b.rope", "1 is neither true nor false"),
    "wrong path under a label": ("knobs: {x: {a: {}, b: {ropes: 1}}}", "knobs.x.b.ropes", "not a knob"),
    "two knobs, one field": (
        "knobs:\n  levels.channels: [32, 48]\n  up[0].channels: [32, 64]",
        "knobs.up[0].channels",
        "levels.channels of the knob 'levels.channels' sets too",
    ),
    "the data's": ("knobs: {latent_channels: [4, 16]}", "knobs.latent_channels", "determined by the data"),
    "fits nowhere": ("knobs:\n  up[1].channels: [32, 48, 50]", "knobs.up[1].channels[2]", "not a multiple of norm"),
    "fits nowhere by label": (
        "knobs: {x: {a: {}, b: {up.num_res_blocks: 0}}}",
        "knobs.x.b",
        "is invalid with every combination of the other knobs' choices: up[0] has no blocks; give it",
    ),
    "base left out": ("knobs: {all.ffn_ratio: [2, 3]}", "knobs.all.ffn_ratio", "every choice changes the base"),
    "brackets in braces": (
        "knobs: {x: {a: {}, b: {up[0].conv: separable}}}",
        "line",
        "quote names with brackets",
    ),
    "key twice": ("knobs: {qk_norm: [true, false], qk_norm: [true, false]}", "line", "twice"),
    # blocks
    "layers not written out": (
        "knobs:\n  down[0].layers[1].num_transformers: [0, 1]",
        "knobs.down[0].layers[1].num_transformers[0]",
        "the layers of down[0] are not written out; give it layers, or name down[0].num_transformers",
    ),
    "no such layer": (
        "blocks: {}\nknobs:\n  mid.layers[2].num_res_blocks: [0, 1]",
        "knobs.mid.layers[2].num_res_blocks[0]",
        "mid has no layer 2; use indices from 0 to 1",
    ),
    "field of a layer": (
        "blocks: {}\nknobs:\n  mid.layers[0].conv: [plain]",
        "knobs.mid.layers[0].conv",
        "unknown field 'conv' of a layer; use one of: num_res_blocks, num_transformers",
    ),
    "too many blocks": ("blocks: {extra_copies: 64}", "knobs.down[0].layers[0].num_res_blocks[65]", "write 64 or less"),
    "count below 0": ("blocks: {extra_copies: -1}", "blocks.extra_copies", "write 0 or more"),
    "count a flag": ("blocks: {extra_copies: true}", "blocks.extra_copies", "true is not a whole number"),
    "a knob of blocks by hand": (
        "blocks: {}\nknobs:\n  mid.layers[0].num_res_blocks: [0, 1]",
        "knobs.mid.layers[0].num_res_blocks",
        "is already added by blocks",
    ),
    "a layer and its stage": (
        "blocks: {}\nknobs:\n  down.num_res_blocks: [1, 2]",
        "knobs.down.num_res_blocks",
        "down.num_res_blocks sets a field that down[0].layers[0].num_res_blocks of the knob",
    ),
    "a layer and all layers": (
        "blocks: {}\nknobs: {x: {a: {}, b: {mid.layers: null}}}",
        "knobs.x",
        "mid.layers sets a field that mid.layers[0].num_res_blocks of the knob",
    ),
    # the rest
    "unknown key": ("knobs: {qk_norm: [false, true]}\nlimit: {params: 1}", "limit", "unknown key; remove it or use"),
    "unknown limit": (
        "knobs: {qk_norm: [false, true]}\nconstraints: {flops: 1}",
        "constraints.flops",
        "'params', 'macs'",
    ),
    "limit not positive": (
        "knobs: {qk_norm: [false, true]}\nconstraints: {macs: 0}",
        "constraints.macs",
        "write a number above 0",
    ),
    "limit a flag": (
        "knobs: {qk_norm: [false, true]}\nconstraints: {macs: true}",
        "constraints.macs",
        "true is not a number",
    ),
    "limit text": (
        "knobs: {qk_norm: [false, true]}\nconstraints: {macs: few}",
        "constraints.macs",
        "'few' is not a number",
    ),
    "context a flag": (
        "knobs: {qk_norm: [false, true]}\ncontext_tokens: true",
        "context_tokens",
        "true is not a whole number",
    ),
    "unknown knob": (
        "knobs: {qk_norm: [false, true]}\nreferences: {r: {rope: true}}",
        "references.r.rope",
        "is not a knob; use one of: qk_norm",
    ),
    "unknown choice": (
        "knobs: {all.ffn_ratio: [2, 4]}\nreferences: {r: {all.ffn_ratio: 3}}",
        "references.r.all.ffn_ratio",
        "3 is not one of the knob's choices; use one of: 2, 4",
    ),
    "reference called base": (
        "knobs: {qk_norm: [false, true]}\nreferences: {base: {qk_norm: true}}",
        "references.base",
        "use another name",
    ),
    "reference that does not fit": (
        "knobs: {all.num_kv_heads: [2, null], w: {a: {}, b: {levels.channels: 64}}}\n"
        "references: {r: {all.num_kv_heads: 2}}",
        "references.r",
        "2 num_kv_heads do not divide",
    ),
}


def error_message(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        load_space(path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_location(tmp_path: Path, mistake: str) -> None:
    text, place, problem = MISTAKES[mistake]
    path = tmp_path / "space.yaml"
    path.write_text(f"{BASE}\n{text}\n")
    message = error_message(path)
    assert message.startswith(f"{path}: {place}")
    assert problem in message


@pytest.mark.parametrize(
    ("base", "place", "problem"),
    [
        ("latent_size: 8", "base", "required"),
        ("latent_size: 8\nbase: sdxxl", "base", "'sdxxl' is neither a preset nor a file in this folder; name one of"),
        ("latent_size: 8\nbase: 3", "base", "not 3"),
        ("latent_size: 8\nbase: {down: []}", "base.down", "at least 1"),
        ("latent_size: 8\nbase: {down: [{channels: 33}], up: [{channels: 33}]}", "base", "33 channels, not a multiple"),
        (
            "latent_size: 6\nbase: snapgen-baseline",
            "latent_size",
            "size 6 cannot be halved 2 times; use a multiple of 4",
        ),
        ("latent_size: true\nbase: snapgen-baseline", "latent_size", "true is not a whole number"),
        ("base: snapgen-baseline", "latent_size", "required"),
        ("latent_size: 8\nbase: bad.json", "", "is empty"),
    ],
)
def test_a_wrong_base_is_named(tmp_path: Path, base: str, place: str, problem: str) -> None:
    (tmp_path / "bad.json").write_text("")
    path = tmp_path / "space.yaml"
    path.write_text(f"{base}\nknobs: {{qk_norm: [false, true]}}\n")
    with pytest.raises(InputError) as raised:
        load_space(path)
    assert problem in str(raised.value)
    assert raised.value.place == place


def test_files_that_are_not_spaces(tmp_path: Path) -> None:
    for name, content in {"empty": b"", "binary": bytes(range(256)), "list": b"- 1", "cut": b"knobs: {a: ["}.items():
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(content)
        error_message(path)
    error_message(tmp_path / "missing.yaml")
    error_message(tmp_path)
    with pytest.raises(InputError, match="emojy: is neither a shipped space nor a file; use emoji or a YAML file"):
        load_space("emojy")
    names = "emoji, emoji-blocks, emoji-factorial, emoji-large, sd15-blocks, snapgen, snapgen-factorial, snapgen-small"
    with pytest.raises(InputError, match=f"mine: is neither a shipped space nor a file; use {names} or a YAML file"):
        load_space("mine")


def test_a_base_from_a_file_beside_the_space(tmp_path: Path) -> None:
    inline = tmp_path / "inline.yaml"
    inline.write_text(GOOD)
    space = load_space(inline)
    (tmp_path / "net.json").write_text(space.base.to_json())
    referring = tmp_path / "referring.yaml"
    referring.write_text("latent_size: 8\nbase: net.json\n" + GOOD.split("up:")[1].split("\n", 3)[3])
    assert load_space(referring).digest == space.digest
    assert load_space(referring).name == "referring"


def test_constraints_in_yaml_notation(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(GOOD)
    assert load_space(path).constraints == {"params": 2.5e6}


def test_mistakes_in_several_knobs_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{BASE}\nknobs:\n  qk_norm: [maybe, true]\n  down[2].channels: [8, 16]\n  all.ffn_ratio: [2]\n")
    with pytest.raises(InputError) as caught:
        load_space(path)
    mistakes = [caught.value, *caught.value.others]
    assert [error.place for error in mistakes] == ["knobs.qk_norm[0]", "knobs.down[2].channels", "knobs.all.ffn_ratio"]

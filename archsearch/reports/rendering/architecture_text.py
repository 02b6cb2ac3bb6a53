"""An architecture in words, and how it differs from another."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from snapgen.architecture.schema import Architecture, BlocksConfig

Site = tuple[str, BlocksConfig]

# What the reader of a chart wants to know first; the rest is said only where it differs.
_HEADLINES = (
    "levels",
    "residual blocks",
    "transformers",
    "layers",
    "self-attention",
    "cross-attention",
    "convs",
    "heads",
    "FFN",
    "QK-norm",
    "RoPE",
)


def describe(arch: Architecture) -> str:
    """One line: levels and widths, blocks, attention, convs, FFN and norms.

    >>> stage = {"channels": 32, "residual_blocks": 1}
    >>> describe(Architecture(down=[stage], mid={"residual_blocks": 1}, up=[stage]))
    '1 level 32; residual blocks 1 down, 1 mid, 1 up; no transformers; plain convs'
    """
    said = aspects(arch)
    return "; ".join(said[name] for name in _HEADLINES if said.get(name))


def differences(arch: Architecture, base: Architecture) -> list[str]:
    """Every aspect in which two architectures differ, e.g. ``FFN ×3 (base: FFN ×4)``; empty: they build one net."""
    ours, theirs = aspects(arch), aspects(base)
    return [
        f"{ours[name] or f'no {name}'} (base: {theirs[name] or f'no {name}'})"
        for name in ours
        if ours[name] != theirs[name]
    ]


def aspects(arch: Architecture) -> dict[str, str]:
    """The phrase for each aspect; two architectures have equal phrases throughout exactly when their ids are equal."""
    arch = arch.canonical()
    deep = [site for site in _sites(arch) if site[1].has_transformers]
    attending = [site for site in deep if site[1].attends]
    return {
        "levels": _levels(arch),
        "residual blocks": f"residual blocks {_counts(arch, lambda blocks: str(blocks.residual_blocks))}",
        "transformers": f"transformers {_counts(arch, _transformers)}" if deep else "no transformers",
        "layers": _layers(arch),
        "self-attention": _attention("self-attention", arch, deep, lambda blocks: blocks.self_attention),
        "cross-attention": _attention("cross-attention", arch, deep, lambda blocks: blocks.cross_attention),
        "convs": _convs(arch),
        "heads": _by_place(arch, attending, _heads),
        "FFN": _by_place(arch, deep, lambda blocks: f"FFN ×{blocks.ffn_ratio:g}"),
        "QK-norm": "QK-norm" if arch.qk_norm else "",
        "RoPE": "RoPE" if arch.rope else "",
        "head width": _by_place(arch, attending, lambda blocks: f"heads of {blocks.head_width}"),
        "time": f"time embedding of {arch.time.frequencies} frequencies, {arch.time.width} wide, "
        f"added at the {arch.time.projection} width",
        "context": f"context {arch.context_width} wide",
        "latent": f"{arch.latent_channels} latent channels",
        "norms": f"norms in {arch.norm_groups} groups",
    }


def _sites(arch: Architecture) -> list[Site]:
    return [(place, blocks) for place, blocks, _ in arch.sites()]


def _samples(arch: Architecture, place: str) -> bool:
    """Whether the place holds a down- or upsampler, whose conv is of the stage's kind."""
    last = len(arch.down) - 1
    return place != "mid" and place not in (f"down[{last}]", "up[0]")


def _levels(arch: Architecture) -> str:
    down, up = (_joined(str(stage.channels) for stage in way) for way in (arch.down, arch.up))
    count = f"{len(arch.down)} level{'s' if len(arch.down) > 1 else ''}"
    same = [s.channels for s in arch.down] == [s.channels for s in arch.up]
    return f"{count} {'-'.join(str(s.channels) for s in arch.down)}" if same else f"{count} {down} down, {up} up"


def _counts(arch: Architecture, count: Callable[[BlocksConfig], str]) -> str:
    down, up = (_joined(count(stage) for stage in way) for way in (arch.down, arch.up))
    return f"{down} down, {count(arch.mid)} mid, {up} up"


def _joined(counts: Iterable[str]) -> str:
    counts = list(counts)
    return counts[0] if len(set(counts)) == 1 else "-".join(counts)


def _transformers(blocks: BlocksConfig) -> str:
    deep = f"×{blocks.transformer_depth}" if blocks.transformer_depth > 1 else ""
    return f"{blocks.transformers}{deep}" if blocks.has_transformers else "0"


def _layers(arch: Architecture) -> str:
    """Residual blocks and transformers of each layer, where they are not dealt evenly."""
    sites = _sites(arch)
    uneven = {place: ", ".join(f"{a}+{b}" for a, b in blocks.layers) for place, blocks in sites if blocks.layers}
    phrases = [f"layers of {dealt} {_where(arch, {place}, sites)}" for place, dealt in uneven.items()]
    return "; ".join(phrases)


def _convs(arch: Architecture) -> str:
    convolving = [site for site in _sites(arch) if site[1].residual_blocks or _samples(arch, site[0])]
    widening = [site for site in convolving if site[1].residual_blocks and site[1].conv == "separable"]
    kinds = _by_place(arch, convolving, lambda blocks: f"{blocks.conv} convs")
    widths = _by_place(arch, widening, lambda blocks: f"×{blocks.expansion:g}")
    if widths in ("", "×1"):
        return kinds
    return f"{kinds} {widths}" if kinds == "separable convs" and " " not in widths else f"{kinds}, expanded {widths}"


def _heads(blocks: BlocksConfig) -> str:
    if blocks.kv_heads is None:
        return "MHSA"
    return "MQA" if blocks.kv_heads == 1 else f"GQA ({blocks.kv_heads} kv heads)"


def _attention(kind: str, arch: Architecture, sites: list[Site], has: Callable[[BlocksConfig], bool]) -> str:
    holding = {place for place, blocks in sites if has(blocks)}
    if not holding:
        return f"no {kind}" if sites else ""
    if len(holding) == len(sites):
        return f"{kind} everywhere"
    return f"{kind} {_where(arch, holding, sites)} only"


def _by_place(arch: Architecture, sites: list[Site], name: Callable[[BlocksConfig], str]) -> str:
    """The one name of all sites, or each name with its places."""
    places: dict[str, set[str]] = {}
    for place, blocks in sites:
        places.setdefault(name(blocks), set()).add(place)
    if len(places) < 2:
        return next(iter(places), "")
    return "; ".join(f"{label} {_where(arch, held, sites)}" for label, held in sorted(places.items()))


def _where(arch: Architecture, held: set[str], sites: list[Site]) -> str:
    """Places as a person names them: levels count from 1, the highest resolution."""
    whole, ways = [], {"down": list[int](), "up": list[int]()}
    for i in range(len(arch.down)):
        there = {place for place, _ in sites if place in (f"down[{i}]", f"up[{i}]")}
        if there and there <= held:
            whole.append(i + 1)
        else:
            for way, levels in ways.items():
                levels += [i + 1] if f"{way}[{i}]" in held else []
    if whole == [len(arch.down)] and "mid" in held and not ways["down"] and not ways["up"]:
        return "at the lowest level"
    phrases = [f"at {_spans(whole)}"] if whole else []
    phrases += [f"on the way {way} at {_spans(levels)}" for way, levels in ways.items() if levels]
    phrases += ["in the middle"] if "mid" in held else []
    return ", ".join(phrases[:-1]) + " and " * (len(phrases) > 1) + phrases[-1]


def _spans(levels: list[int]) -> str:
    """``[1, 2, 3, 5]`` as ``levels 1–3, 5``."""
    spans: list[list[int]] = []
    for level in levels:
        if spans and spans[-1][-1] == level - 1:
            spans[-1].append(level)
        else:
            spans.append([level])
    text = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans)
    return f"level{'s' if len(levels) > 1 else ''} {text}"

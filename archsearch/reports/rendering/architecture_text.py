"""Text that describes an architecture and how it differs from another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from snapgen.architecture.schema import Architecture, BlocksConfig

Site = tuple[str, BlocksConfig]

# The aspects that `describe` names; the others appear only in `differences`.
_DESCRIBED = (
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
    """Describe an architecture in one line: levels and widths, blocks, attention, convs, FFN and norms.

    >>> stage = {"channels": 32, "num_res_blocks": 1}
    >>> describe(Architecture(down=[stage], mid={"num_res_blocks": 1}, up=[stage]))
    '1 level 32; residual blocks 1 down, 1 mid, 1 up; no transformers; standard convs'
    """
    phrases = aspects(arch)
    return "; ".join(phrases[name] for name in _DESCRIBED if phrases.get(name))


def differences(arch: Architecture, base: Architecture) -> list[str]:
    """List every aspect that differs, e.g. ``FFN ×3 (base: FFN ×4)``; empty if both build the same network."""
    phrases, base_phrases = aspects(arch), aspects(base)
    return [
        f"{phrases[name] or f'no {name}'} (base: {base_phrases[name] or f'no {name}'})"
        for name in phrases
        if phrases[name] != base_phrases[name]
    ]


def aspects(arch: Architecture) -> dict[str, str]:
    """Phrase for each aspect of an architecture; all phrases of two architectures are equal iff their ids are equal."""
    arch = arch.canonical()
    with_transformers = [site for site in _sites(arch) if site[1].has_transformers]
    with_attention = [site for site in with_transformers if site[1].has_attention]
    return {
        "levels": _levels(arch),
        "residual blocks": f"residual blocks {_counts(arch, lambda blocks: str(blocks.num_res_blocks))}",
        "transformers": f"transformers {_counts(arch, _transformers)}" if with_transformers else "no transformers",
        "layers": _layers(arch),
        "self-attention": _attention("self-attention", arch, with_transformers, lambda blocks: blocks.self_attention),
        "cross-attention": _attention(
            "cross-attention", arch, with_transformers, lambda blocks: blocks.cross_attention
        ),
        "convs": _convs(arch),
        "heads": _by_site(arch, with_attention, _heads),
        "FFN": _by_site(arch, with_transformers, lambda blocks: f"FFN ×{blocks.ffn_ratio:g}"),
        "QK-norm": "QK-norm" if arch.qk_norm else "",
        "RoPE": "RoPE" if arch.rope else "",
        "head dim": _by_site(arch, with_attention, lambda blocks: f"heads of {blocks.head_dim}"),
        "time": f"time embedding of {arch.time.embed_dim} frequencies, {arch.time.hidden_dim} wide, "
        f"added at the {arch.time.projection} width",
        "context": f"context {arch.context_dim} wide",
        "latent": f"{arch.latent_channels} latent channels",
        "norms": f"norms in {arch.norm_groups} groups",
    }


def _sites(arch: Architecture) -> list[Site]:
    return [(name, blocks) for name, blocks, _ in arch.named_levels()]


def _resamples(arch: Architecture, name: str) -> bool:
    """Whether a site has a down- or upsampling convolution, which is of the level's conv kind."""
    last = len(arch.down) - 1
    return name != "mid" and name not in (f"down[{last}]", "up[0]")


def _levels(arch: Architecture) -> str:
    down, up = (_joined(str(level.channels) for level in levels) for levels in (arch.down, arch.up))
    count = f"{len(arch.down)} level{'s' if len(arch.down) > 1 else ''}"
    same = [level.channels for level in arch.down] == [level.channels for level in arch.up]
    return (
        f"{count} {'-'.join(str(level.channels) for level in arch.down)}" if same else f"{count} {down} down, {up} up"
    )


def _counts(arch: Architecture, count: Callable[[BlocksConfig], str]) -> str:
    down, up = (_joined(count(level) for level in levels) for levels in (arch.down, arch.up))
    return f"{down} down, {count(arch.mid)} mid, {up} up"


def _joined(counts: Iterable[str]) -> str:
    counts = list(counts)
    return counts[0] if len(set(counts)) == 1 else "-".join(counts)


def _transformers(blocks: BlocksConfig) -> str:
    depth = f"×{blocks.transformer_depth}" if blocks.transformer_depth > 1 else ""
    return f"{blocks.num_transformers}{depth}" if blocks.has_transformers else "0"


def _layers(arch: Architecture) -> str:
    """Residual blocks and transformers of each layer, for the sites that list their layers explicitly."""
    sites = _sites(arch)
    explicit = {name: ", ".join(f"{a}+{b}" for a, b in blocks.layers) for name, blocks in sites if blocks.layers}
    phrases = [f"layers of {layers} {_where(arch, {name}, sites)}" for name, layers in explicit.items()]
    return "; ".join(phrases)


def _convs(arch: Architecture) -> str:
    with_convs = [site for site in _sites(arch) if site[1].num_res_blocks or _resamples(arch, site[0])]
    expandable = [site for site in with_convs if site[1].num_res_blocks and site[1].conv == "separable"]
    kinds = _by_site(arch, with_convs, lambda blocks: f"{blocks.conv} convs")
    expansions = _by_site(arch, expandable, lambda blocks: f"×{blocks.expansion:g}")
    if expansions in ("", "×1"):
        return kinds
    uniform = kinds == "separable convs" and " " not in expansions
    return f"{kinds} {expansions}" if uniform else f"{kinds}, expanded {expansions}"


def _heads(blocks: BlocksConfig) -> str:
    if blocks.num_kv_heads is None:
        return "MHSA"
    return "MQA" if blocks.num_kv_heads == 1 else f"GQA ({blocks.num_kv_heads} kv heads)"


def _attention(kind: str, arch: Architecture, sites: list[Site], has: Callable[[BlocksConfig], bool]) -> str:
    having = {name for name, blocks in sites if has(blocks)}
    if not having:
        return f"no {kind}" if sites else ""
    if len(having) == len(sites):
        return f"{kind} everywhere"
    return f"{kind} {_where(arch, having, sites)} only"


def _by_site(arch: Architecture, sites: list[Site], label_of: Callable[[BlocksConfig], str]) -> str:
    """The label that all sites share, or each label followed by its sites."""
    names_by_label: dict[str, set[str]] = {}
    for name, blocks in sites:
        names_by_label.setdefault(label_of(blocks), set()).add(name)
    if len(names_by_label) < 2:
        return next(iter(names_by_label), "")
    return "; ".join(f"{label} {_where(arch, names, sites)}" for label, names in sorted(names_by_label.items()))


def _where(arch: Architecture, names: set[str], sites: list[Site]) -> str:
    """Site names as a phrase; levels are counted from 1, the highest resolution."""
    both_sides, one_side = [], {"down": list[int](), "up": list[int]()}
    for i in range(len(arch.down)):
        at_level = {name for name, _ in sites if name in (f"down[{i}]", f"up[{i}]")}
        if at_level and at_level <= names:
            both_sides.append(i + 1)
        else:
            for side, levels in one_side.items():
                levels += [i + 1] if f"{side}[{i}]" in names else []
    if both_sides == [len(arch.down)] and "mid" in names and not one_side["down"] and not one_side["up"]:
        return "at the lowest level"
    phrases = [f"at {_spans(both_sides)}"] if both_sides else []
    phrases += [f"on the way {side} at {_spans(levels)}" for side, levels in one_side.items() if levels]
    phrases += ["in the middle"] if "mid" in names else []
    return ", ".join(phrases[:-1]) + " and " * (len(phrases) > 1) + phrases[-1]


def _spans(levels: list[int]) -> str:
    """Format level numbers as ranges: ``[1, 2, 3, 5]`` becomes ``levels 1–3, 5``."""
    spans: list[list[int]] = []
    for level in levels:
        if spans and spans[-1][-1] == level - 1:
            spans[-1].append(level)
        else:
            spans.append([level])
    text = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans)
    return f"level{'s' if len(levels) > 1 else ''} {text}"

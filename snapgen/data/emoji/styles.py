"""Five more drawings of the emoji, as SVG icons of npm packages of Iconify, which the set ``emoji-styles`` adds.

Icons are matched to emoji by their code points where the package has them, otherwise by their names, which are those of
Unicode's character database or of its newer Common Locale Data Repository (emojibase's labels).
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from snapgen.data.emoji.concepts import EmojiImage, normalize
from snapgen.data.emoji.npm import NpmPackage
from snapgen.errors import InputError

WIDTH = 128
"""Width in pixels at which the icons are drawn, before they are scaled to the set's resolutions."""


@dataclass(frozen=True)
class IconSet(NpmPackage):
    """An npm package of SVG icons of emoji in one style."""

    vendor: str
    """Vendor of its images, as in the samples' names."""
    style: str
    """Style that its captions name: "red apple, flat style"."""


ICON_SETS = (
    IconSet(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        vendor="fluentflat",
        style="flat",
    ),
    IconSet(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        vendor="notov1",
        style="blob",
    ),
    IconSet(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        vendor="twemoji",
        style="Twitter",
    ),
    IconSet(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        vendor="fxemoji",
        style="Firefox",
    ),
    IconSet(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        vendor="emojione",
        style="EmojiOne",
    ),
)
STYLES = {icon_set.vendor: icon_set.style for icon_set in ICON_SETS}
"""Styles by vendor."""


def drawings(
    icon_set: IconSet, packages: Path, labels: Mapping[str, str], *, square: Callable[[Image.Image], Image.Image]
) -> list[EmojiImage]:
    """Draw the icons of a set that match an emoji, in the order of their hexcodes.

    Args:
        icon_set: the set.
        packages: folder of the npm tarballs.
        labels: emojibase's label of each emoji, by its normalized hexcode.
        square: puts a drawing on a white square.
    """
    icons = json.loads(icon_set.read(packages, "package/icons.json"))
    chars = json.loads(icon_set.read(packages, "package/chars.json"))
    return [
        EmojiImage(icon_set.vendor, code, square(_draw(_svg(icons, name))))
        for code, name in sorted(match(icons, chars, labels).items())
    ]


def match(icons: Mapping[str, Any], chars: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """Names of a set's icons by the hexcodes of the emoji that they draw.

    Args:
        icons: Iconify's icons.json.
        chars: Iconify's chars.json: names by hexcodes; empty in sets without code points.
        labels: labels by normalized hexcodes.
    """
    # An alias that turns or mirrors its parent has more keys than its parent's name.
    plain_aliases = (name for name, alias in icons.get("aliases", {}).items() if set(alias) == {"parent"})
    names = [*(name for name, icon in icons["icons"].items() if not icon.get("hidden")), *plain_aliases]
    named = {normalize(hexcode): name for hexcode, name in chars.items()}
    known = frozenset(names)
    matched = {code: name for code, name in named.items() if code in labels and name in known}
    codes = _codes_by_name(labels)
    for name in names:
        code = codes.get(_letters(_full_name(name, known)))
        if code is not None:
            matched.setdefault(code, name)
    return matched


def _full_name(name: str, names: frozenset[str]) -> str:
    """The name by which Unicode knows an icon."""
    # Firefox OS calls the face of a cat "cat", and the whole animal "catside".
    if f"{name}side" in names:
        return f"{name}-face"
    return re.sub(r"^flag-for-", "flag-", name.removesuffix("side"))


def _codes_by_name(labels: Mapping[str, str]) -> dict[str, str]:
    """Hexcodes by label and, where no emoji has that label, by the character's name in Unicode."""
    characters = {code: unicodedata.name(chr(int(code, 16)), "") for code in labels if "-" not in code}
    codes = {_letters(name): code for code, name in characters.items() if name}
    return codes | {_letters(label): code for code, label in labels.items()}


def _letters(name: str) -> str:
    """Letters and digits of a name, without accents and in lower case, so that spellings of one name are equal."""
    decomposed = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return "".join(character for character in decomposed if character.isascii() and character.isalnum())


def _svg(icons: Mapping[str, Any], name: str) -> str:
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def _draw(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError:  # a tool of this command only
        raise InputError("resvg_py", "is not installed", "pip install 'archsearch[pack]'") from None
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=WIDTH, skip_system_fonts=True))))

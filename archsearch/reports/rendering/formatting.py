"""Format the numbers of a score: with a unit, an interval, and as many digits as the noise allows."""

from __future__ import annotations

import math
from collections.abc import Iterable

from archsearch.score import QUALITY_METRICS, LatencyRecord, Score, metric_label
from archsearch.stats.estimate import Estimate

COSTS = ("latency_ms", "params", "macs", "activation_bytes")

NBSP = "\u00a0"
"""No-break space between a number and its unit."""

_UNITS = {"params": "M", "macs": "M", "activation_bytes": "MB", "latency_ms": "ms"}
_SHORT = {"params": "params", "activation_bytes": "activations"}


def value_of(score: Score, name: str) -> Estimate | None:
    """Return one number of a score in the unit that `unit` names, or None if it was not measured.

    Quality numbers come with their 95 % interval, latency with its quartiles or, if it is predicted, its 90 % interval;
    costs are exact.
    """
    if (value := score.find(name)) is None:
        return None
    if name in QUALITY_METRICS:
        estimate: Estimate = getattr(score.quality, name)
        return estimate
    if name == "latency_ms" and score.latency:
        return score.latency.estimate
    return Estimate.exact(value / 1e6 if name in _UNITS else value)


def unit(name: str) -> str:
    """Unit of the numbers that `value_of` returns; empty for quality."""
    return _UNITS.get(name, "")


def label(
    name: str, extractor: str, proxy: str | None = None, records: Iterable[LatencyRecord] = (), *, short: bool = False
) -> str:
    """Display name of an objective, without its unit; see `metric_label`."""
    return (_SHORT.get(name) if short else None) or metric_label(name, extractor, proxy, records)


def axis(name: str, extractor: str, proxy: str | None = None, records: Iterable[LatencyRecord] = ()) -> str:
    """Axis title of an objective: its display name, and its unit if it has one."""
    text = label(name, extractor, proxy, records)
    text = text[0].upper() + text[1:]
    return f"{text} ({unit(name)})" if unit(name) else text


def with_interval(title: str, interval: str) -> str:
    """Head of a column whose numbers have an interval [a, b]: it names what that is, if there is any."""
    return f"{title} [{interval}]" if interval else title


def number(value: float, noise: float = 0.0) -> str:
    """Format a number with as many digits as its noise (half its interval) allows; three to five digits without noise.

    >>> number(0.512345, 0.0123), number(822.4, 31.0), number(12.3456), number(0.0)
    ('0.512', '822', '12.3', '0')
    """
    if not math.isfinite(value):
        return str(value)
    exponent = math.floor(math.log10(abs(value))) if value else 0
    digits = 2 - exponent
    if noise > 0:  # two significant digits of the noise, at most five of the value
        digits = min(1 - math.floor(math.log10(noise)), 4 - exponent)
    text = f"{value:,.{max(digits, 0) if value or noise else 0}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text.replace("-", "−")


def format_value(interval: Estimate, name: str, *, ends: bool = False) -> str:
    """Format a number with its unit, and with the interval if ``ends``: ``12.3 ms``, ``0.512 [0.500, 0.525]``."""
    suffix = f"{NBSP}{unit(name)}" if unit(name) else ""
    if ends and interval.high > interval.low:
        return format_interval(interval, suffix=suffix)
    return number(interval.value, (interval.high - interval.low) / 2) + suffix


def format_ends(interval: Estimate) -> str:
    """The interval of a number alone, to its digits: ``[0.500, 0.525]``; empty for an exact number."""
    return format_interval(interval).partition(" ")[2]


def format_change(interval: Estimate, *, relative: bool) -> str:
    """Format an effect with its sign and interval: ``+12 % [8, 16]``, ``−0.021 [−0.030, −0.012]``."""
    sign = "+" if interval.value > 0 else ""
    return sign + (format_interval(interval, scale=100, suffix=f"{NBSP}%") if relative else format_interval(interval))


def format_span(interval: Estimate) -> str:
    """Format a counted relative change with its smallest and largest size: ``+12 % (8 to 16)``, ``0 %``."""
    text = f"{format_change(Estimate.exact(interval.value), relative=True)}"
    low, high = number(100 * interval.low), number(100 * interval.high)
    return text if low == high else f"{text} ({low} to {high})"


def format_interval(interval: Estimate, *, scale: float = 1, suffix: str = "") -> str:
    """Format a number times ``scale`` with its interval, all to the same digits: ``0.512 [0.500, 0.525]``.

    An exact number has no interval.
    """
    noise = scale * (interval.high - interval.low) / 2
    value, low, high = (number(scale * end, noise) for end in (interval.value, interval.low, interval.high))
    return f"{value}{suffix} [{low}, {high}]" if noise else f"{value}{suffix}"


def percent(fraction: float) -> str:
    """Format a fraction in whole percent."""
    return f"{100 * fraction:.0f}{NBSP}%"


def ticks(values: Iterable[float]) -> list[float]:
    """Round numbers for a logarithmic axis; empty unless all values are positive and span a factor of 5 or more."""
    values = list(values)
    if not values or min(values) <= 0 or max(values) / min(values) < 5:
        return []
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    steps = (1, 2, 3, 5, 7) if len(decades) < 4 else (1, 3)
    return [float(f"{step}e{decade}") for decade in decades for step in steps]

"""Charts as inline SVG. Colours and type come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from kka_ray.report.run_folder import LABELS

Point = tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """Values of one arm: its name, each seed's value, their mean and standard deviation, and both in words."""

    name: str
    values: Sequence[float]
    mean: float
    std: float
    words: str


@dataclass(frozen=True)
class Histogram:
    """A histogram from `low` to `high`, and how many images lie outside and are counted in its first and last bars."""

    svg: Markup
    low: float
    high: float
    normals_outside: int
    drawn_outside: int


def series(values: Sequence[float], name: str, write: Callable[[float], str]) -> Markup:
    """A value a round, from 0 upwards. `write` turns a value into its label."""
    width, height, left, right, top, bottom = 300, 132, 22, 22, 26, 24
    high = _nice_top(max(values))
    xs = _places(len(values), left, width - right)
    ys = [height - bottom - (height - top - bottom) * v / high for v in values]
    labelled = range(len(values)) if len(values) <= 4 else (0, len(values) - 1)
    parts = [
        _line((left - 10, height - bottom), (width - right + 10, height - bottom), "axis"),
        _polyline(zip(xs, ys, strict=True), "curve"),
        *(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in zip(xs, ys, strict=True)),
        *(_text(xs[i], ys[i] - 9, write(values[i]), "value") for i in labelled),
        *(_text(xs[i], height - 7, str(i), "tick") for i in (range(len(xs)) if len(xs) <= 12 else labelled)),
    ]
    said = ", ".join(f"round {i}: {write(v)}" for i, v in enumerate(values))
    return _svg(width, height, f"{name} by round. {said}", parts)


def spreads(rows: Sequence[Spread], name: str) -> Markup:
    """Each seed's value as a dot, mean and standard deviation as a bar, an arm a line."""
    width, line, left, right, top, bottom = 720, 36, 190, 26, 4, 30
    height = top + line * len(rows) + bottom
    low = min(min((*r.values, r.mean - r.std)) for r in rows)
    high = max(max((*r.values, r.mean + r.std)) for r in rows)
    pad = max((high - low) * 0.08, 0.002)
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    steps = ticks(low, high, 5)
    digits = max(0, -math.floor(math.log10(steps[1] - steps[0]))) if len(steps) > 1 else 4
    base = top + line * len(rows)
    parts = [_line((x(t), top), (x(t), base), "gridline") for t in steps]
    parts += [_text(x(t), base + 20, f"{t:.{digits}f}", "tick") for t in steps]
    for i, row in enumerate(rows):
        y = top + line * (i + 0.5)
        strong = " strong" if row.name == "KKA" else ""
        parts += [
            _text(left - 14, y + 4.5, row.name, f"name{strong}"),
            _line((x(row.mean - row.std), y), (x(row.mean + row.std), y), f"spread{strong}"),
            *(f'<circle class="seed" cx="{x(v):.1f}" cy="{y:.1f}" r="4"/>' for v in row.values),
            _line((x(row.mean), y - 9), (x(row.mean), y + 9), f"mean{strong}"),
        ]
    said = ", ".join(f"{r.name}: {r.words}" for r in rows)
    return _svg(width, height, f"{name}. {said}", parts, "wide")


def histogram(
    normals: Sequence[float], drawn: Mapping[str, Sequence[float]], lower: float, upper: float, easy: float
) -> Histogram:
    """Hardness of the validation normals above that of the drawn images by label, the hard band shaded in both."""
    width, left, right, panel, gap, top, bottom = 720, 44, 12, 118, 46, 40, 46
    ours = np.concatenate([np.asarray(drawn[label], float) for label in LABELS])
    theirs = np.asarray(normals, float)
    everything = np.concatenate([theirs, ours])
    low = max(float(everything.min()), -8.0)
    # A few images far out would squeeze all others into the first bars.
    wanted = max(float(np.quantile(ours, 0.95)), easy + 0.5 * (easy - low))
    edge = float(math.ceil(min(float(everything.max()), wanted) + 1e-9))
    edges = np.linspace(low, max(edge, low + 1), 49)
    edge = float(edges[-1])

    def x(value: float) -> float:
        return left + (width - left - right) * (value - low) / (edge - low)

    def shares(values: np.ndarray, total: int) -> np.ndarray:
        return np.histogram(np.clip(values, low, edge), edges)[0] / max(total, 1)

    parts = []
    height = top + 2 * panel + gap + bottom
    named = left + 60.0  # where the band's name ends
    if lower < upper:
        band = max(x(min(upper, edge)) - x(lower), 1)
        tall = height - bottom - 16
        parts.append(f'<rect class="band" x="{x(lower):.1f}" y="16" width="{band:.1f}" height="{tall}"/>')
        named = max(x(lower) + band, named)
        parts.append(_text(named, 12, "hard band", "value end"))
    if easy < edge:
        parts.append(_line((x(easy), 16), (x(easy), height - bottom), "edge"))
        parts.append(_text(max(x(easy) + 5, named + 10), 12, "easy from here on", "remark start"))
    panels = [
        (f"validation normals ({len(theirs):,})", [("normal", shares(theirs, len(theirs)))]),
        (f"drawn images ({len(ours):,})", [(n, shares(np.asarray(drawn[n], float), len(ours))) for n in LABELS]),
    ]
    for i, (title, layers) in enumerate(panels):
        base = top + panel + i * (panel + gap)
        stack = np.zeros(len(edges) - 1)
        high = _nice_top(float(sum(s for _, s in layers).max()))  # type: ignore[union-attr]
        for label, values in layers:
            parts.append(_bars(x, edges, stack / high * panel, (stack + values) / high * panel, base, label))
            stack = stack + values
        parts += [
            _line((left, base), (width - right, base), "axis"),
            _text(width - right, base - panel - 6, title, "name"),
            _text(left - 6, base - panel + 8, f"{100 * high:.3g} %", "tick end"),
            _text(left - 6, base, "0", "tick end"),
        ]
    parts += [_text(x(t), height - bottom + 18, f"{t:g}", "tick") for t in ticks(low, edge, 8)]
    parts.append(_text((left + width - right) / 2, height - 6, "hardness (MADs above the typical normal)", "remark"))
    said = (
        f"Histograms of hardness. Validation normals: median {np.median(theirs):.2f}. Drawn images: median "
        f"{np.median(ours):.2f}. The hard band reaches from {lower:.2f} to {upper:.2f}, easy begins at {easy:.2f}."
    )
    outside = [int(((values < low) | (values > edge)).sum()) for values in (theirs, ours)]
    return Histogram(_svg(width, height, said, parts, "wide"), low, edge, *outside)


def latent(points: Mapping[str, Sequence[Point]], farthest: float, name: str) -> Markup:
    """Points about the centre, by label: the direction as it is, the distance r as log(1 + r), `farthest` at most."""
    side = 360
    half = side / 2 - 4
    reach = math.log1p(farthest)
    parts = [f'<circle class="ring" cx="{side / 2}" cy="{side / 2}" r="{half}"/>']
    rings: dict[int, float] = {}
    for ring in (1, 3, 10, 30, 100, 300, 1000):
        radius = half * math.log1p(ring) / reach
        if ring <= farthest and radius - max(rings.values(), default=0.0) >= (16 if rings else 0):
            rings[ring] = radius
    for ring, radius in rings.items():
        kind = "ring unit" if ring == 1 else "ring"
        parts.append(f'<circle class="{kind}" cx="{side / 2}" cy="{side / 2}" r="{radius:.1f}"/>')
    for label in ("normal", "easy", "between", "normal_like", "hard"):
        if points.get(label):
            path = "".join(_marker(label, *_place(p, side / 2, half, reach)) for p in points[label])
            parts.append(f'<path class="mark {label}" d="{path}"/>')
    parts += [
        _text(side / 2 + 3, side / 2 - radius + 12, str(ring), "ringname start") for ring, radius in rings.items()
    ]
    counts = ", ".join(f"{len(p)} {label.replace('_', '-')}" for label, p in points.items() if p)
    return _svg(side, side, f"{name}: {counts} about the centre", parts)


def marker(label: str) -> Markup:
    """The mark of a label in the map, for a legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 12 12" aria-hidden="true"><path class="mark {}" d="{}"/></svg>'
    ).format(label, _marker(label, 6, 6))


def curves(lines: Mapping[str, Sequence[Point]], name: str) -> Markup:
    """(step, value) lines, one a round, later rounds stronger, each named at its end."""
    width, height, left, right, top, bottom = 460, 220, 48, 76, 12, 30
    everything = [p for line in lines.values() for p in line]
    x_low, x_high = min(p[0] for p in everything), max(p[0] for p in everything)
    y_low, y_high = min(0.0, *(p[1] for p in everything)), max(p[1] for p in everything)
    x_high, y_high = max(x_high, x_low + 1), y_high + max((y_high - y_low) * 0.06, 1e-6)

    def place(point: Point) -> Point:
        return (
            left + (width - left - right) * (point[0] - x_low) / (x_high - x_low),
            height - bottom - (height - top - bottom) * (point[1] - y_low) / (y_high - y_low),
        )

    parts = []
    for t in ticks(y_low, y_high, 4):
        y = place((x_low, t))[1]
        parts += [_line((left, y), (width - right, y), "gridline"), _text(left - 7, y + 4, f"{t:g}", "tick end")]
    parts += [_text(place((t, y_low))[0], height - bottom + 18, f"{t:g}", "tick") for t in ticks(x_low, x_high, 5)]
    parts.append(_text(width - right + 24, height - bottom + 18, "step", "remark start"))
    ends = _apart({title: place(line[-1])[1] for title, line in lines.items()}, 15)
    for i, (title, line) in enumerate(lines.items()):
        strength = 0.4 + 0.6 * (i + 1) / len(lines)
        placed = [place(p) for p in line]
        shape = _polyline(placed, "curve") if len(placed) > 1 else f'<circle class="point" r="3.5" {_at(placed[0])}/>'
        parts.append(f'<g opacity="{strength:.2f}">{shape}</g>')
        parts.append(_text(placed[-1][0] + 7, ends[title] + 4, title, "remark start"))
    said = ", ".join(f"{title}: from {line[0][1]:.3g} to {line[-1][1]:.3g}" for title, line in lines.items())
    return _svg(width, height, f"{name} by training step. {said}", parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within low..high, about so many; `low` alone if equal."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _nice_top(value: float) -> float:
    """A round number that is not below `value`; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(s * power for s in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if s * power >= value * 0.999)


def _places(count: int, low: float, high: float) -> list[float]:
    if count == 1:
        return [(low + high) / 2]
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def _place(point: Point, centre: float, half: float, reach: float) -> Point:
    radius = math.hypot(*point)
    scale = half * min(math.log1p(radius) / reach, 1.0) / radius if radius else 0.0
    return centre + point[0] * scale, centre - point[1] * scale


def _marker(label: str, x: float, y: float) -> str:
    if label == "easy":
        return f"M{x - 2:.1f} {y - 2:.1f}l4 4m0-4l-4 4"
    if label == "between":
        return f"M{x - 2.7:.1f} {y:.1f}h5.4m-2.7-2.7v5.4"
    return f"M{x:.1f} {y:.1f}h0"  # a dot or a square: the ends of a stroke without length


def _bars(
    x: Callable[[float], float], edges: np.ndarray, low: np.ndarray, high: np.ndarray, base: float, label: str
) -> str:
    path = "".join(
        f"M{x(edges[i]):.1f} {base - low[i]:.1f}V{base - high[i]:.1f}H{x(edges[i + 1]) - 0.8:.1f}V{base - low[i]:.1f}z"
        for i in range(len(low))
        if high[i] > low[i]
    )
    return f'<path class="bar {label}" d="{path}"/>'


def _apart(places: Mapping[str, float], least: float) -> dict[str, float]:
    """The places moved downwards where two are closer than `least`."""
    out: dict[str, float] = {}
    last = -math.inf
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        out[name] = last = max(place, last + least)
    return out


def _line(start: Point, end: Point, kind: str) -> str:
    return f'<path class="{kind}" d="M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"/>'


def _polyline(points: Iterable[Point], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _at(point: Point) -> str:
    return f'cx="{point[0]:.1f}" cy="{point[1]:.1f}"'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(width: float, height: float, said: str, parts: Iterable[str], kind: str = "") -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg class="chart {kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(said)}">'
        f"{body}</svg>"
    )

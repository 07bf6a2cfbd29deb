"""The built-in demo domain: procedurally drawn flowers with captions.

A flower is five *species attributes* (petal count, petal shape, petal colour, centre colour, petal pattern) in a
*scene* (size, position, rotation, tilt, leaves, background, light). One range of species attributes is normal;
a flower with any attribute outside that range is an anomaly. The scene never decides: it varies alike for both.

The number of attributes outside the normal range is the `Flower.distance` (0 for a normal flower, at most 5): one
is a near anomaly, three or more is a far one.

A fixed fifth of all anomalous attribute combinations is kept for testing (`is_held_out`): test anomalies
are drawn from these alone, and the built-in renderer and the attribute classifier never see one of them.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import astuple, dataclass, replace

import numpy as np

SIZE = 64
"""Side of a drawn image, in pixels."""

_SUPERSAMPLE = 3
_REACH = 1.2
"""No petal reaches farther from the centre, in units of the flower's radius: at the tips petals have no width."""

COUNTS: dict[int, str] = {3: "three", 4: "four", 5: "five", 6: "six", 8: "eight", 12: "twelve", 20: "twenty"}
SHAPES = ("rounded", "notched", "pointed", "narrow", "ruffled")
PATTERNS = ("plain", "spotted", "striped", "tipped")
PETAL_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (244, 242, 236),
    "pink": (240, 130, 175),
    "purple": (140, 70, 175),
    "yellow": (248, 210, 50),
    "orange": (240, 135, 35),
    "red": (205, 35, 45),
    "blue": (70, 105, 215),
}
CENTRE_COLOURS: dict[str, tuple[int, int, int]] = {
    "yellow": (245, 205, 55),
    "brown": (120, 75, 40),
    "green": (120, 170, 60),
    "white": (240, 238, 225),
    "black": (38, 32, 36),
}
_PATTERN_WORDS = {
    "plain": "",
    "spotted": " with dark spots",
    "striped": " with dark stripes",
    "tipped": " with dark tips",
}
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "green grass": ((70, 120, 50), (110, 160, 80)),
    "dark shade": ((22, 30, 26), (48, 58, 50)),
    "blue sky": ((150, 190, 230), (195, 220, 240)),
    "brown soil": ((105, 80, 58), (140, 112, 85)),
    "grey stone": ((135, 135, 138), (175, 173, 170)),
}
LIGHTS: dict[str, tuple[float, tuple[float, float, float]]] = {
    "bright sunlight": (1.12, (1.02, 1.0, 0.96)),
    "soft light": (1.0, (1.0, 1.0, 1.0)),
    "dim light": (0.72, (0.97, 0.98, 1.05)),
    "warm evening light": (0.92, (1.06, 0.98, 0.9)),
}
SIZES = {"small": 0.52, "medium": 0.68, "large": 0.86}


@dataclass(frozen=True)
class Flower:
    """The species attributes. `distance` counts those outside the normal range."""

    petals: int
    shape: str
    colour: str
    centre: str
    pattern: str

    @property
    def distance(self) -> int:
        """How many of the five attributes lie outside the normal range: 0 (normal) to 5."""
        return sum(getattr(self, name) not in allowed for name, allowed in NORMAL.items())

    @property
    def is_held_out(self) -> bool:
        """Whether this combination is kept for test anomalies (a fixed fifth of the anomalous ones, by hash)."""
        if self.distance == 0:
            return False
        digest = hashlib.sha256("|".join(map(str, astuple(self))).encode()).digest()
        return digest[0] % 5 == 0


ATTRIBUTES: dict[str, tuple] = {
    "petals": tuple(COUNTS),
    "shape": SHAPES,
    "colour": tuple(PETAL_COLOURS),
    "centre": tuple(CENTRE_COLOURS),
    "pattern": PATTERNS,
}
"""Every value of each species attribute."""

NORMAL: dict[str, tuple] = {
    "petals": (5, 6),
    "shape": ("rounded", "notched"),
    "colour": ("white", "pink", "purple"),
    "centre": ("yellow", "brown"),
    "pattern": ("plain",),
}
"""The normal range of each species attribute."""

TEST_DISTANCES = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}
"""Shares of the test anomalies by distance: 40 % near, 30 % middling, 30 % far."""


@dataclass(frozen=True)
class Scene:
    """What varies alike for normal and anomalous flowers; the numbers are in units of the image's side or radians."""

    background: str
    light: str
    size: str
    leaves: int
    centre_x: float
    centre_y: float
    rotation: float
    tilt: float
    tilt_direction: float


def all_flowers() -> list[Flower]:
    """Every combination of species attributes (4,900)."""
    return [Flower(*values) for values in itertools.product(*ATTRIBUTES.values())]


def sample_normal(rng: np.random.Generator) -> Flower:
    """A flower with every attribute inside the normal range, uniformly."""
    return Flower(**{name: allowed[rng.integers(len(allowed))] for name, allowed in NORMAL.items()})


def sample_anomaly(rng: np.random.Generator, distance: int, *, held_out: bool) -> Flower:
    """A flower with exactly `distance` attributes outside the normal range.

    `held_out=True` draws from the combinations kept for testing, `False` from the others. Raises ValueError if
    `distance` is not between 1 and 5.
    """
    if not 1 <= distance <= len(NORMAL):
        raise ValueError(f"distance must be between 1 and {len(NORMAL)}, got {distance}")
    while True:
        outside = set(rng.choice(list(NORMAL), size=distance, replace=False))
        values = {}
        for name, allowed in NORMAL.items():
            choices = [v for v in ATTRIBUTES[name] if (v in allowed) != (name in outside)]
            values[name] = choices[rng.integers(len(choices))]
        flower = Flower(**values)
        if flower.is_held_out == held_out:
            return flower


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene."""
    return Scene(
        background=str(rng.choice(list(BACKGROUNDS))),
        light=str(rng.choice(list(LIGHTS))),
        size=str(rng.choice(list(SIZES))),
        leaves=int(rng.integers(0, 4)),
        centre_x=float(rng.uniform(0.44, 0.56)),
        centre_y=float(rng.uniform(0.42, 0.54)),
        rotation=float(rng.uniform(0, 2 * np.pi)),
        tilt=float(rng.uniform(0.78, 1.0)),
        tilt_direction=float(rng.uniform(0, np.pi)),
    )


def caption(flower: Flower, scene: Scene, rng: np.random.Generator) -> str:
    """A caption in the style of the Oxford-102 captions: always the species attributes, sometimes the scene."""
    count, shape, colour, centre = COUNTS[flower.petals], flower.shape, flower.colour, flower.centre
    pattern = _PATTERN_WORDS[flower.pattern]
    heads = (
        f"this flower has {count} {shape} {colour} petals{pattern} and a {centre} center",
        f"a flower with {count} {shape} {colour} petals{pattern} and a {centre} center",
        f"the petals are {colour} and {shape}{pattern}, there are {count} of them around a {centre} center",
        f"a {colour} flower with {count} {shape} petals{pattern} and a {centre} center",
        f"{count} {shape} {colour} petals{pattern} surround a {centre} center",
    )
    tails = ["", "", f" on {scene.background}", f" in {scene.light}", f" on {scene.background} in {scene.light}"]
    if scene.leaves:
        tails += [" with green leaves", f" with green leaves on {scene.background}"]
    return str(rng.choice(heads)) + str(rng.choice(tails))


def brief_caption(flower: Flower, rng: np.random.Generator) -> str:
    """A caption that leaves out some attributes, as people do; it teaches a renderer to fill in what is not said."""
    said = {name for name in ATTRIBUTES if rng.random() < 0.6} or {"colour"}
    petals = [COUNTS[flower.petals]] if "petals" in said else []
    petals += [getattr(flower, name) for name in ("shape", "colour") if name in said]
    text = " ".join([str(rng.choice(["a flower with", "this flower has"])), *petals, "petals"])
    if "pattern" in said:
        text += _PATTERN_WORDS[flower.pattern]
    if "centre" in said:
        text += f" and a {flower.centre} center"
    return text


def draw(flower: Flower, scene: Scene, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Draws one flower, anti-aliased. Returns uint8 (size, size, 3), RGB."""
    side = size * _SUPERSAMPLE
    edge = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = edge[None], edge[:, None]
    # The background is out of focus: drawing it at the final size loses nothing and saves most of the time.
    coarse = _background(scene, rng, x[:, 1::_SUPERSAMPLE], y[1::_SUPERSAMPLE])
    canvas = coarse.repeat(_SUPERSAMPLE, axis=0).repeat(_SUPERSAMPLE, axis=1)
    dx, dy = x - scene.centre_x, y - scene.centre_y
    _stem_and_leaves(canvas, scene, rng, dx, dy)
    _flower_head(canvas, flower, scene, rng, dx, dy)
    _apply_light(canvas, scene, rng, x, y)
    small = _shrunk(canvas)
    small += rng.normal(0, 2.0, small.shape).astype(np.float32)
    return np.clip(np.rint(small), 0, 255).astype(np.uint8)


def _shrunk(canvas: np.ndarray) -> np.ndarray:
    """The mean of each block of pixels, a `_SUPERSAMPLE`th of the side."""
    parts = [canvas[i::_SUPERSAMPLE, j::_SUPERSAMPLE] for i in range(_SUPERSAMPLE) for j in range(_SUPERSAMPLE)]
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def _rgb(colour: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    return np.asarray(colour, np.float32)


def _places(mask: np.ndarray) -> np.ndarray:
    """Where the mask (H, W) holds, as places in the flattened picture: what is drawn there is computed there alone."""
    return mask.ravel().nonzero()[0]


def _put(canvas: np.ndarray, places: np.ndarray, colour: np.ndarray) -> None:
    """Puts `colour` ((3,) or (P, 3)) on the canvas at its P `places`."""
    canvas.reshape(-1, 3)[places] = colour


def _background(scene: Scene, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A gradient with out-of-focus blobs, float32 (H, W, 3) in 0..255; x (1, W) and y (H, 1)."""
    low, high = map(_rgb, BACKGROUNDS[scene.background])
    ramp = np.clip(0.5 + (y - 0.5) * rng.uniform(-1, 1) + (x - 0.5) * rng.uniform(-0.6, 0.6), 0, 1)[..., None]
    canvas = low * ramp + high * (1 - ramp)
    for _ in range(7):
        bx, by = rng.uniform(0, 1, 2)
        radius = rng.uniform(0.06, 0.2)
        glow = np.exp(-(((x - bx) ** 2 + (y - by) ** 2) / radius**2))[..., None]
        shift = (high - low) * rng.uniform(-0.8, 0.8) + rng.normal(0, 7, 3).astype(np.float32)
        canvas = canvas + glow * shift
    return canvas.astype(np.float32)


def _stem_and_leaves(
    canvas: np.ndarray, scene: Scene, rng: np.random.Generator, dx: np.ndarray, dy: np.ndarray
) -> None:
    green = _rgb((70, 125, 55)) + rng.normal(0, 8, 3).astype(np.float32)
    bend = rng.uniform(-0.25, 0.25)
    _put(canvas, _places((dy > 0) & (np.abs(dx - bend * dy**2) < 0.016)), green * 0.9)
    for _ in range(scene.leaves):
        angle = rng.uniform(0, 2 * np.pi)
        length, width = rng.uniform(0.42, 0.56), rng.uniform(0.07, 0.11)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        u, v = (dx * cos + dy * sin) / length, (dy * cos - dx * sin) / width
        places = _places((u > 0) & (u < 1) & (np.abs(v) < 1))
        u, v = u.ravel()[places], v.ravel()[places]
        inside = np.abs(v) < 1.9 * np.sqrt(u) * (1 - u)
        places, v = places[inside], v[inside]
        vein = (np.abs(v) < 0.06)[:, None]
        tone = green * (0.85 + 0.3 * v)[:, None]
        _put(canvas, places, np.where(vein, green * 0.7, tone))


def _flower_head(
    canvas: np.ndarray, flower: Flower, scene: Scene, rng: np.random.Generator, dx: np.ndarray, dy: np.ndarray
) -> None:
    radius = 0.5 * SIZES[scene.size] * rng.uniform(0.95, 1.05)
    cos, sin = float(np.cos(scene.tilt_direction)), float(np.sin(scene.tilt_direction))
    along, across = dx * cos + dy * sin, (-dx * sin + dy * cos) / scene.tilt
    rho = np.hypot(along, across) / radius
    places = _places(rho < _REACH)
    along, across, rho = (values.ravel()[places] for values in (along, across, rho))
    theta = np.arctan2(across, along) - scene.rotation
    step = 2 * np.pi / flower.petals
    index = np.rint(theta / step)
    lengths = rng.uniform(0.93, 1.0, flower.petals).astype(np.float32)
    u = rho * np.cos(theta - index * step) / lengths[index.astype(int) % flower.petals]
    v = rho * np.sin(theta - index * step)

    width = _petal_half_width(flower, u, v)
    petal = ((u > 0) & (np.abs(v) < width)).nonzero()[0]
    base = _rgb(PETAL_COLOURS[flower.colour]) + rng.normal(0, 6, 3).astype(np.float32)
    _put(canvas, places[petal], _petal_colour(flower, base, u[petal], v[petal], width[petal], index[petal]))

    disc = 0.24
    inside = (rho < disc).nonzero()[0]
    dome = np.sqrt(np.clip(1 - (rho[inside] / disc) ** 2, 0, 1))
    grain = 0.1 * np.sin(along[inside] / radius * 60) * np.sin(across[inside] / radius * 60)
    heart = _rgb(CENTRE_COLOURS[flower.centre]) * (0.68 + 0.34 * dome + grain)[:, None]
    _put(canvas, places[inside], heart)


def _petal_colour(
    flower: Flower, base: np.ndarray, u: np.ndarray, v: np.ndarray, width: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """Colours (P, 3) at P places of petals: u along and v across each, its half width there, and its number."""
    relative = np.abs(v) / np.maximum(width, 1e-4)
    shade = 0.62 + 0.38 * np.clip(u * 1.6, 0, 1) - 0.16 * np.clip(relative, 0, 1) ** 6 - 0.07 * (np.abs(v) < 0.012)
    tone = base * shade[:, None] * (1 + 0.05 * np.sin(index * 2.4))[:, None]
    mark = _pattern_mask(flower, u, v, width)
    return np.where(mark[:, None], _pattern_colour(flower.colour) * (0.8 + 0.2 * shade)[:, None], tone)


def _petal_half_width(flower: Flower, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Half the petal's width at the distance `u` along it (1 = its tip), in units of its length."""
    sector = min(float(np.tan(np.pi / max(flower.petals, 4))), 0.62)
    t = np.clip(u, 0, 1)
    if flower.shape == "pointed":
        return sector * 1.75 * t**0.8 * (1 - t) ** 0.9
    if flower.shape == "narrow":
        return 0.5 * sector * 1.45 * t**0.6 * (1 - t) ** 0.35
    rounded = sector * 1.5 * t**0.75 * (1 - t) ** 0.32
    if flower.shape == "notched":
        notch = 1 - 0.3 * np.exp(-((v / (0.3 * sector)) ** 2))
        return np.where(u < notch, rounded, 0)
    if flower.shape == "ruffled":
        edge = 1 - 0.13 * (1 + np.sin(v / sector * 13))
        return np.where(u < edge, rounded * (1 - 0.14 * (1 + np.sin(t * 32))), 0)
    return rounded


def _pattern_mask(flower: Flower, u: np.ndarray, v: np.ndarray, width: np.ndarray) -> np.ndarray:
    if flower.pattern == "spotted":
        # Dots on a lattice whose pitch follows the petal's width, so that many narrow petals carry dots as well.
        pitch = float(np.clip(1.1 * np.tan(np.pi / max(flower.petals, 4)), 0.12, 0.3))
        du = (u / 0.2) % 1 - 0.5
        dv = (v / pitch + 0.5) % 1 - 0.5
        return ((du * 0.2) ** 2 + (dv * pitch) ** 2 < 0.06**2) & (u > 0.3)
    if flower.pattern == "striped":
        relative = v / np.maximum(width, 1e-4)
        return (np.abs(np.abs(relative) - 0.45) < 0.17) & (u > 0.25) & (u < 0.95)
    if flower.pattern == "tipped":
        return u > 0.74
    return np.zeros_like(u, bool)


def _pattern_colour(colour: str) -> np.ndarray:
    """Marks are dark in the petal's own hue."""
    return _rgb(PETAL_COLOURS[colour]) * 0.34


def _apply_light(canvas: np.ndarray, scene: Scene, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> None:
    level, tint = LIGHTS[scene.light]
    angle = rng.uniform(0, 2 * np.pi)
    slope = 1 + 0.14 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    vignette = 1 - 0.22 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    strength = level * slope * vignette
    for channel in range(3):
        canvas[..., channel] *= strength * float(np.float32(tint[channel]))


@dataclass(frozen=True)
class DrawnFlower:
    """One image of the domain with everything that is known of it."""

    image: np.ndarray
    caption: str
    flower: Flower
    scene: Scene


def make(flower: Flower, rng: np.random.Generator) -> DrawnFlower:
    """Draws `flower` in a random scene and captions it."""
    scene = sample_scene(rng)
    text = caption(flower, scene, rng)
    return DrawnFlower(draw(flower, scene, rng), text, flower, scene)


def make_normals(count: int, seed: int) -> list[DrawnFlower]:
    """`count` normal flowers; the same list for the same seed."""
    rng = np.random.default_rng([seed, 0])
    return [make(sample_normal(rng), rng) for _ in range(count)]


def make_test_anomalies(count: int, seed: int) -> list[DrawnFlower]:
    """`count` anomalies with held-out attribute combinations, their distances shared as in `TEST_DISTANCES`."""
    return make_anomalies(count, np.random.default_rng([seed, 1]), held_out=True)


def make_anomalies(count: int, rng: np.random.Generator, *, held_out: bool) -> list[DrawnFlower]:
    """`count` anomalies with the distances of `TEST_DISTANCES`, all or none with a held-out combination."""
    distances = rng.choice(list(TEST_DISTANCES), size=count, p=list(TEST_DISTANCES.values()))
    return [make(sample_anomaly(rng, int(d), held_out=held_out), rng) for d in distances]


def make_renderer_data(count: int, seed: int, shard: int = 0) -> list[DrawnFlower]:
    """`count` flowers for training renderers and classifiers: all attribute values, no held-out combination.

    Shards of the same seed differ and can be drawn by different processes.
    """
    rng = np.random.default_rng([seed, 2, shard])
    out: list[DrawnFlower] = []
    while len(out) < count:
        flower = Flower(**{name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()})
        # Half of them near the normal range, where the renderer has to be exact.
        if rng.random() < 0.5:
            distance = int(rng.integers(0, 3))
            flower = sample_normal(rng) if distance == 0 else sample_anomaly(rng, distance, held_out=False)
        if not flower.is_held_out:
            drawn = make(flower, rng)
            if rng.random() < 0.3:
                drawn = replace(drawn, caption=brief_caption(flower, rng))
            out.append(drawn)
    return out

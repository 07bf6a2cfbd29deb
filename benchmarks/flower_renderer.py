"""Whether a renderer draws the flowers that it is asked for: `python benchmarks/flower_renderer.py --renderer MODEL`.

Captions of flowers that no training has shown are drawn as `configs/demo.yaml` says, and `kka_ray.data.flower_reader`,
which neither the renderer nor the loop has anything to do with, reads the attributes off the images. Beside the share
that is read right stand those of the same flowers drawn by the domain itself, and of images drawn for other captions
(chance). Writes `benchmarks/results/flower_renderer.json`, and with `--grid` a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image

from kka_ray.config import load
from kka_ray.config.models import RunConfig
from kka_ray.data import flowers
from kka_ray.data.flower_reader import FlowerReader, accuracy
from kka_ray.evaluation import spread
from kka_ray.files import write_json
from kka_ray.render.renderer import Renderer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "flower_renderer.json"
_STREAM = 4
"""Of the random numbers; the domain's own lists have 0 to 2, the ceiling's has 3."""
_GRID = 12
"""Images in a row of the picture."""


def captioned(count: int, seed: int, *, held_out: bool) -> list[flowers.DrawnFlower]:
    """Anomalies with the distances of the test's, of combinations that renderers were shown or of those that not."""
    return flowers.make_anomalies(count, np.random.default_rng([seed, _STREAM, held_out]), held_out=held_out)


def draw(renderer: Renderer, captions: list[str], seed: int) -> np.ndarray:
    """An image (64, 64, 3) a caption, uint8."""
    drawn = renderer.draw(captions, [seed * 1_000_003 + i for i in range(len(captions))])
    images = [image for image in drawn if isinstance(image, np.ndarray)]
    if len(images) < len(drawn):
        raise RuntimeError(f"{len(drawn) - len(images)} of {len(drawn)} images could not be drawn")
    return np.stack(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--renderer", default="builtin:flowers", help="builtin:, or a folder")
    parser.add_argument("--count", type=int, default=256, help="captions of either kind and seed")
    parser.add_argument("--seeds", type=int, default=3, help="of captions and images")
    parser.add_argument("--steps", type=int, default=None, help="by default as the demo draws")
    parser.add_argument("--guidance", type=float, default=None, help="by default as the demo draws")
    parser.add_argument("--grid", type=Path, default=None, help="a picture to write: images of the domain over drawn")
    parser.add_argument("--target", type=Path, default=RESULT)
    arguments = parser.parse_args()

    asked = {"pipeline": arguments.renderer, "steps": arguments.steps, "guidance": arguments.guidance}
    overrides = [f"render.{name}={value}" for name, value in asked.items() if value is not None]
    render = load(ROOT / "configs" / "demo.yaml", RunConfig, overrides).render
    renderer, reader = Renderer.load(render), FlowerReader.load()
    result = {}
    for kind, held_out in (("shown", False), ("held_out", True)):
        rows = []
        for seed in range(arguments.seeds):
            wanted = captioned(arguments.count, seed, held_out=held_out)
            images, truth = draw(renderer, [w.caption for w in wanted], seed), [w.flower for w in wanted]
            rows.append(
                {
                    "drawn": accuracy(reader, images, truth),
                    "by_the_domain": accuracy(reader, np.stack([w.image for w in wanted]), truth),
                    "chance": accuracy(reader, np.roll(images, 1, axis=0), truth),
                }
            )
            print(kind, seed, rows[-1], flush=True)
            if arguments.grid is not None and seed == 0 and held_out:
                pictures = [Image.fromarray(i) for i in (*(w.image for w in wanted[:_GRID]), *images[:_GRID])]
                make_image_grid(pictures, 2, _GRID).save(arguments.grid)
        result[kind] = {of: {name: spread([row[of][name] for row in rows]) for name in rows[0][of]} for of in rows[0]}
    about = {"renderer": arguments.renderer, "steps": render.steps, "guidance": render.guidance}
    write_json(arguments.target, about | {"captions": arguments.count} | result)


if __name__ == "__main__":
    main()

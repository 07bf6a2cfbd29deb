"""How much a renderer's images are worth on photographs: `python benchmarks/renderer.py --data DIR --renderer MODEL`.

DIR holds `cifar100` in Parquet; MODEL is a text-to-image pipeline (builtin:, hub: or a folder), which draws as
`configs/cifar100_furniture.yaml` says unless `--steps` and the like say otherwise. Features are those of
EfficientNet-Lite0 at 96 px. `--without-superclasses` names a second renderer that was trained without four whole
superclasses; anomalies of these are what `unseen_gain_ratio` is measured on. A distilled renderer is compared with the
plain sampler of its `--teacher`. A seed changes the split, what the language model writes and what is drawn; of the
fidelity, of which `--fidelity-seeds` says the seeds, what is drawn and which real images the Fréchet distance compares.
Writes `benchmarks/results/renderer.json`, and with `--grid` a picture.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from diffusers.utils import make_image_grid
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from kka_ray.benchmark import made_with
from kka_ray.config import load
from kka_ray.config.models import BackboneConfig, Cifar100Data, Knn, LinearHead, RenderConfig, RunConfig
from kka_ray.data import open_data
from kka_ray.data.base import DataModule
from kka_ray.data.captions import with_article
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.describe.guard import Guard
from kka_ray.describe.prompts import build_prompts
from kka_ray.describe.sampler import build_sampler
from kka_ray.detectors import build
from kka_ray.evaluation import spread
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.features.text import TextEncoder
from kka_ray.files import write_json
from kka_ray.render.matching import Matcher, draw_matching
from kka_ray.render.renderer import DrawError, Renderer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "renderer.json"
CONFIG = ROOT / "configs" / "cifar100_furniture.yaml"
UNSEEN = ("insects", "fish", "food_containers", "non-insect_invertebrates")
ANOMALIES = 62
A_CLASS = 20
"""Images drawn of each class for its fidelity."""
SHOWN = ("apple", "castle", "chair", "forest", "lion", "orange", "plain", "poppy", "rocket", "sea", "wardrobe", "woman")
"""Classes in the picture, a row each."""
A_ROW = 12
"""Images of a class in it."""


def run_config(data: Path) -> RunConfig:
    """The run on CIFAR-100 furniture, whose settings for describing and drawing are measured here."""
    return load(CONFIG, RunConfig, [f"data.path={data / 'cifar100'}"])


def class_ranks(drawn: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Rank of each image's own class among the centroids by cosine, 0 the nearest; features are L2-normalised."""
    similar = drawn @ centroids.T
    own = similar[np.arange(len(labels)), labels][:, None]
    return (similar > own).sum(1)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, (N, D) and (M, D)."""
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The trace of the root of AB is the sum of the singular values of root(A) root(B).
    roots = [_root(a), _root(b)]
    cross = scipy.linalg.svdvals(roots[0] @ roots[1]).sum()
    difference = first.mean(0) - second.mean(0)
    return float(difference @ difference + np.trace(a) + np.trace(b) - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def real_vs_drawn(real: np.ndarray, drawn: np.ndarray, seed: int) -> float:
    """Cross-validated AUC of a linear classifier that tells drawn from real images by their features."""
    labels = np.repeat([0, 1], [len(real), len(drawn)])
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=2000, class_weight="balanced")
    scores = cross_val_predict(model, np.concatenate([real, drawn]), labels, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, scores))


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure over seeds, and, of more than one seed, its standard deviation as `..._std`."""
    spreads = {name: spread([row[name] for row in rows]) for name in rows[0]}
    means = {name: values["mean"] for name, values in spreads.items()}
    return means | ({f"{name}_std": values["std"] for name, values in spreads.items()} if len(rows) > 1 else {})


def gain_ratio(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean gain on what the second renderer never saw over that of the first, and the deviation of the seeds' ratios.

    The ratio is of the means: a single seed's gain may be near 0.
    """
    ratio = float(np.mean([row["unseen_gain"] for row in rows]) / np.mean([row["seen_gain"] for row in rows]))
    of_seeds = summary([{"unseen_gain_ratio": row["unseen_gain"] / row["seen_gain"]} for row in rows])
    return of_seeds | {"unseen_gain_ratio": ratio}


class Drawer:
    """A renderer, with the matcher that has images drawn again where the configuration asks for it."""

    def __init__(self, config: RenderConfig, threads: int) -> None:
        self.config = config
        self.renderer = Renderer.load(config, threads=threads)
        self.matcher = Matcher.load(config.pipeline) if config.match else None

    def draw(self, texts: Sequence[str], seed: int) -> list[np.ndarray | DrawError]:
        """One image a text, or why there is none."""
        seeds = [100_000 * seed + i for i in range(len(texts))]
        if self.matcher is None or self.config.match is None:
            return self.renderer.draw(texts, seeds)
        return [d.image for d in draw_matching(self.renderer, self.matcher, self.config.match, texts, seeds)]


class Bench:
    """The data and models that all seeds share."""

    def __init__(self, data: Path, renderer: Drawer, second: Drawer | None) -> None:
        self.data, self.renderer, self.second = data, renderer, second
        self.lines: list[str] = []
        """What the language model wrote, of all seeds so far."""
        self.backbone = Backbone.load(BackboneConfig())
        self.encoder = TextEncoder()
        columns = ["image", "class_name", "superclass", "source"]
        train = read_rows(shards(data / "cifar100", "train"), columns)
        self.classes = sorted({row["class_name"] for row in train})
        self.train_labels = np.array([self.classes.index(row["class_name"]) for row in train])
        self.train_groups = np.array([row["superclass"] for row in train])
        self.train = self._features(decode_rows(train, "cifar100"))
        test = open_data(self._data_config(), 0).test()
        assert test is not None
        self.test = self._features(test.images)
        self.anomalous = test.anomalous
        groups = {row["class_name"]: row["superclass"] for row in train}
        self.test_groups = np.array([groups[name] for name in test.classes])

    def fidelity(self, seed: int, grid: Path | None) -> dict[str, float]:
        """Nearest class centroids and Fréchet distance of `A_CLASS` images of every class; some of them into `grid`.

        What could not be drawn is left out of both, and counted as `class_failed`.
        """
        centroids = np.stack([self.train[self.train_labels == c].mean(0) for c in range(len(self.classes))])
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
        texts = [f"a photo of {with_article(name.replace('_', ' '))}" for name in self.classes for _ in range(A_CLASS)]
        images = self.renderer.draw(texts, seed)
        if grid is not None:
            save_grid([images[self.classes.index(name) * A_CLASS + i] for name in SHOWN for i in range(A_ROW)], grid)
        labels = np.repeat(np.arange(len(self.classes)), A_CLASS)
        there = [(image, label) for image, label in zip(images, labels, strict=True) if isinstance(image, np.ndarray)]
        drawn = self._features([image for image, _ in there])
        ranks = class_ranks(drawn, np.array([label for _, label in there]), centroids)
        # Sets of one size: the distance depends on it.
        rows = np.random.default_rng(seed).permutation(min(len(self.train), len(self.test)))[: len(drawn)]
        real = frechet(self.train[rows], self.test[rows])
        return {
            "class_top1": float((ranks < 1).mean()),
            "class_top5": float((ranks < 5).mean()),
            "class_failed": len(images) - len(there),
            "frechet_ratio": frechet(drawn, self.test[rows]) / real,
        }

    def seed(self, seed: int) -> dict[str, float]:
        """What anomalies drawn from written descriptions, and from normal captions, do for the detector."""
        module = open_data(self._data_config(), seed)
        normals = module.normals()
        train, validation = self._features(normals.train.images), self._features(normals.validation.images)
        rng = np.random.default_rng(seed)
        texts = self.describe(module, train, seed)
        self.lines += texts
        captions = [normals.train.captions[i] for i in rng.permutation(len(train))]
        controls = self.draw(self.renderer, captions[: len(validation)], seed + 1000)
        outside = np.flatnonzero(self.train_groups != "household_furniture")
        real = self.train[rng.permutation(outside)[:ANOMALIES]]
        drawn = self.draw(self.renderer, texts, seed)

        def auc(anomalies: np.ndarray | None, only: Sequence[str] = ()) -> float:
            config = Knn(kind="knn") if anomalies is None else LinearHead(kind="fused")
            detector = build(config)
            given = None if anomalies is None else Features(anomalies)
            detector.fit(Features(train), given, Features(validation), seed)
            keep = ~self.anomalous | np.isin(self.test_groups, only) if only else np.ones(len(self.test), bool)
            scores = detector.score(Features(self.test[keep]))
            return float(roc_auc_score(self.anomalous[keep], scores))

        row = {
            "usefulness_auc": auc(drawn),
            "control_auc": auc(controls[:ANOMALIES]),
            "knn_auc": auc(None),
            "real_images_auc": auc(real),
            "real_vs_drawn_auc": real_vs_drawn(validation, controls, seed),
        }
        row["meaning_gain"] = row["usefulness_auc"] - row["control_auc"]
        if self.second is not None:
            without = self.draw(self.second, texts, seed)
            base = auc(None, UNSEEN)
            row["seen_gain"], row["unseen_gain"] = auc(drawn, UNSEEN) - base, auc(without, UNSEEN) - base
        return row

    def describe(self, module: DataModule, pooled: np.ndarray, seed: int) -> list[str]:
        """`ANOMALIES` descriptions by the language model, without preference training, that the guard let pass."""
        config = run_config(self.data)
        train = module.normals().train
        prompts = [p.text for p in build_prompts(train, pooled, module.subject, config.describe, seed)]
        guard = Guard(config.describe.guard, module.normal_terms, train.captions, self.encoder)
        sampler = build_sampler(config.describe)
        passed: list[str] = []
        for attempt in range(20):
            lines = [line for part in sampler.sample(prompts, 8, 1000 * seed + attempt) for line in part]
            passed += [text for text, reason in guard.judge(lines) if not reason]
            if len(passed) >= ANOMALIES:
                return passed[:ANOMALIES]
        raise RuntimeError(f"the guard let only {len(passed)} of {20 * 8 * len(prompts)} lines pass")

    def draw(self, renderer: Drawer, texts: Sequence[str], seed: int) -> np.ndarray:
        """Features of one image a text, but for those that failed."""
        return self._features([image for image in renderer.draw(texts, seed) if isinstance(image, np.ndarray)])

    def _features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.backbone.extract(list(images), patches=False).pooled

    def _data_config(self) -> Cifar100Data:
        return Cifar100Data(kind="cifar100", path=str(self.data / "cifar100"))


def save_grid(images: Sequence[np.ndarray | DrawError], target: Path) -> None:
    """A row for every `A_ROW` images, twice their size; white where there is none."""
    blank = np.full((64, 64, 3), 255, np.uint8)
    shown = [image if isinstance(image, np.ndarray) else blank for image in images]
    pictures = [Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in shown]
    make_image_grid(pictures, rows=len(images) // A_ROW, cols=A_ROW).save(target, optimize=True)


def speed(config: RenderConfig, teacher: str, threads: int) -> dict[str, float]:
    """Images a second, and the same as a multiple of 25 guided steps of `teacher`: in turns, in one process."""
    plain = config.model_copy(update={"pipeline": teacher, "steps": 25})
    renderers = [Renderer.load(c, threads=threads) for c in (config, plain)]
    texts = ["a photo of an apple"] * config.chunk
    rates: list[list[float]] = [[], []]
    for repeat in range(4):
        for renderer, found in zip(renderers, rates, strict=True):
            start = time.perf_counter()
            renderer.draw(texts, [1000 * repeat + i for i in range(len(texts))])
            found.append(len(texts) / (time.perf_counter() - start))
    fast, slow = (np.array(found[1:]) for found in rates)  # the first round warms up
    return {
        "images_per_second": float(fast.mean()),
        "images_per_second_std": float(fast.std(ddof=1)),
        "times_plain_sampler": float(np.median(fast / slow)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the Parquet sets")
    parser.add_argument("--renderer", required=True, help="builtin:, hub: or a folder with a pipeline")
    parser.add_argument("--without-superclasses", help="a renderer trained without " + ", ".join(UNSEEN))
    parser.add_argument("--steps", type=int, help="by default what the configuration says; so are the next two")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--without-steps", type=int, help="of the second renderer, by default those of the first")
    parser.add_argument("--teacher", help="what a distilled renderer was made from; by default the renderer itself")
    parser.add_argument("--redraws", type=int, help="times that an image unlike its text is drawn again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fidelity-seeds", type=int, default=1, help=f"each draws {A_CLASS} images of every class")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", type=Path, default=RESULT)
    parser.add_argument("--grid", type=Path, help="a PNG of images of some classes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {k: v for k in ("steps", "guidance") if (v := getattr(arguments, k)) is not None}
    config = run_config(arguments.data).render.model_copy(update={"pipeline": arguments.renderer, "chunk": 64, **given})
    if arguments.redraws is not None and config.match:
        config = config.model_copy(update={"match": config.match.model_copy(update={"redraws": arguments.redraws})})
    second = None
    if arguments.without_superclasses:
        own = {"pipeline": arguments.without_superclasses, "steps": arguments.without_steps or config.steps}
        second = Drawer(config.model_copy(update=own), arguments.threads)
    bench = Bench(arguments.data, Drawer(config, arguments.threads), second)
    fidelity = [bench.fidelity(s, arguments.grid if s == 0 else None) for s in range(arguments.fidelity_seeds)]
    rows = [bench.seed(seed) for seed in range(arguments.seeds)]
    result: dict[str, Any] = {
        "renderer": arguments.renderer,
        "steps": config.steps,
        "guidance": config.guidance,
        "match": config.match.model_dump() if config.match else None,
        "seeds": arguments.seeds,
        "fidelity_seeds": arguments.fidelity_seeds,
        "threads": arguments.threads,
        **summary(fidelity),
        **summary(rows),
        **speed(config, arguments.teacher or arguments.renderer, arguments.threads),
    }
    result["made_with"] = made_with(arguments.renderer)
    # Another guard or prompt makes other lines, and other figures.
    result["lines_sha256"] = hashlib.sha256("\n".join(bench.lines).encode()).hexdigest()
    if second is None:
        result["unseen_gain_ratio"] = None
        result["unseen_gain_reason"] = "no renderer trained without the four superclasses was given"
    else:
        result["without_steps"] = second.config.steps
        result |= gain_ratio(rows)
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.target, result)


if __name__ == "__main__":
    main()

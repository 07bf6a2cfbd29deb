"""How fast detectors are, as ratios: `python benchmarks/detectors.py`.

Scoring is held against the bare forward pass of the backbone, measured in turns in one process. With `--authors`, a
checkout of github.com/DonaldRR/SimpleNet, SimpleNet's training is held against the authors' code on our backbone: a
step with features given, with equal batch and equal widths, and a whole training; they train for 160 epochs, and with
fewer (`--epochs`) the time is scaled up and no AUC is given. What is not measured (`--epochs 0` leaves the training
out) stays as the file has it. With `--anomalib`, the Python of an environment with anomalib, its PatchCore and PaDiM
are measured on our backbone. With `--data` the images are those of CIFAR-100 furniture, else they are noise. Writes
`benchmarks/results/detector_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import authors_simplenet
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from kka_ray import assets, versions
from kka_ray.config.models import BackboneConfig, Cifar100Data, PatchCore, SimpleNet
from kka_ray.data import open_data
from kka_ray.detectors import DETECTORS, build, default
from kka_ray.detectors.simplenet.branch import Branch
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import ConfigError
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.features.pixels import resize
from kka_ray.files import write_json

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "detector_speed.json"
IMAGES, BATCH, SIZE = 64, 16, 96
"""Images that are scored; how many the bare backbone takes at a time, which suits CPUs best; their side."""
AUTHORS_EPOCHS = 160  # 40 times 4


def ratios(floor: Callable[[], Any], functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median over rounds of each function's time as a multiple of the floor's; all are run in turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        base = seconds(floor)
        for name, function in functions.items():
            found[name].append(seconds(function) / base)
    return {name: statistics.median(values[1:]) for name, values in found.items()}  # the first round warms up


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def normalised(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images (N, 3, 96, 96) as the built-in backbone's network sees them."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.stack([resize(image, i, SIZE) for i, image in enumerate(images)])
    return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def scoring(backbone: Backbone, features: Features, images: Sequence[np.ndarray], rounds: int) -> dict[str, Any]:
    """Scoring of images by every detector, and by SimpleNet on ONNX Runtime, as multiples of the bare forward pass."""
    parts_of_x = normalised(images[:IMAGES]).split(BATCH)
    few, fits, functions = images[:IMAGES], {}, {}
    half = len(features) // 2
    with tempfile.TemporaryDirectory() as folder:
        for kind in DETECTORS:
            config = default(kind)
            parts = [features.take(range(half)), features.take(range(10)), features.take(range(half, len(features)))]
            anomalies = None if build(config).ignores_anomalies else parts[1]
            started = time.perf_counter()
            tuned = TunedDetector.fit(config, backbone, parts[0], anomalies, parts[2], 0, 0.05)
            fits[kind] = time.perf_counter() - started
            functions[kind] = lambda t=tuned: t.score_images(few)
            tuned.save(Path(folder) / kind)
        try:
            fast = TunedDetector.load(Path(folder) / "simplenet", engine="onnx")
            functions["simplenet, ONNX Runtime"] = lambda: fast.score_images(few)
        except ConfigError as error:
            print(f"without ONNX Runtime: {error}")
        with torch.inference_mode():
            found = ratios(lambda: [backbone.network(x) for x in parts_of_x], functions, rounds)
    return {name: {"times_backbone": ratio, "fit_seconds": fits.get(name)} for name, ratio in found.items()}


def step(features: Features, checkout: Path, backbone: Backbone, rounds: int) -> dict[str, float]:
    """A step on all patches of 64 images, ours and the authors', with as many dimensions and hidden units."""
    grid = torch.from_numpy(features.patches).flatten(1, 2)  # type: ignore[arg-type]
    rows, channels = grid[:64], grid.shape[2]
    branch = Branch(channels, channels, 2 * channels)
    generator = torch.Generator().manual_seed(0)
    branch.start(grid.flatten(0, 1)[:20_000].float(), 0.3, 1.0, 0.5, generator)
    optimizer = torch.optim.Adam(branch.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)

    def ours() -> None:
        x = branch.standardise(rows.flatten(0, 1))
        noise = torch.randn(len(x), channels, generator=generator)
        branch.set_gradients(x, noise, x[:0], (1 / len(x), 0.0), 0.5)
        optimizer.step()

    model = authors_simplenet.load(checkout, backbone.network, SIZE, channels, 2 * channels, 0.015)
    model._embed = lambda *_, **__: (rows.flatten(0, 1).float(), None)
    loader = [{"image": torch.zeros(64)}]
    first = ratios(ours, {"authors": lambda: model._train_discriminator(loader)}, rounds)
    return {"patches": rows.shape[0] * rows.shape[1], "authors_times_ours": first["authors"]}


def training(
    data: Path | None, checkout: Path, backbone: Backbone, noise: Sequence[np.ndarray], most: int, epochs: int
) -> dict[str, Any]:
    """A whole training on at most so many normals: features and fit here, the authors' epochs there."""
    if data is None:
        train, validation, test = noise[:-20], noise[-20:], None
    else:
        module = open_data(Cifar100Data(kind="cifar100", path=str(data / "cifar100")), 0)
        train, validation = module.normals().train.images, module.normals().validation.images
        test = module.test()
    train = train[:most]
    started = time.perf_counter()
    known, held_out = (backbone.extract(x, patches=True) for x in (train, validation))
    extracting = time.perf_counter() - started
    detector = build(SimpleNet())
    fitting = seconds(lambda: detector.fit(known, None, held_out, 0))
    torch.manual_seed(0)
    model = authors_simplenet.load(checkout, backbone.network, SIZE, 1536, 1024, 0.015)
    x = normalised(train)
    theirs = seconds(lambda: [model._train_discriminator(authors_simplenet.batches(x, 8)) for _ in range(epochs)])
    theirs *= AUTHORS_EPOCHS / epochs
    result: dict[str, Any] = {
        "images": len(train),
        "extract_seconds": extracting,
        "fit_seconds": fitting,
        "authors_seconds": theirs,
        "authors_epochs_run": epochs,
        "authors_times_ours": theirs / (extracting + fitting),
        "authors_times_fit": theirs / fitting,
    }
    if test is not None and epochs == AUTHORS_EPOCHS:
        ours = detector.score(backbone.extract(test.images, patches=True))
        given = authors_simplenet.scores(model, normalised(test.images), 64)
        result |= {"auc": roc_auc_score(test.anomalous, ours), "authors_auc": roc_auc_score(test.anomalous, given)}
    return result


def anomalib(python: Path, images: Sequence[np.ndarray], coreset: float, rounds: int) -> dict[str, Any]:
    """What `benchmarks/anomalib_reference.py` finds in the other environment."""
    weights = assets.resolve("builtin:efficientnet-lite0").path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        np.save(file, normalised(images).contiguous().numpy())
        command = [python, ROOT / "benchmarks" / "anomalib_reference.py", weights, file, coreset]
        done = subprocess.run(
            [str(part) for part in (*command, torch.get_num_threads(), rounds)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"anomalib failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with cifar100 in Parquet")
    parser.add_argument("--authors", type=Path, help="a checkout of github.com/DonaldRR/SimpleNet")
    parser.add_argument("--anomalib", type=Path, help="the Python of an environment with anomalib")
    parser.add_argument("--images", type=int, default=256, help="images that detectors are fitted to for the timing")
    parser.add_argument("--normals", type=int, default=1000, help="at most, of the whole training")
    parser.add_argument("--epochs", type=int, default=AUTHORS_EPOCHS, help="epochs of the authors' training")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of each measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    noise = list(rng.integers(0, 256, (arguments.images, 32, 32, 3), dtype=np.uint8))
    images: Sequence[np.ndarray] = noise
    if arguments.data:
        module = open_data(Cifar100Data(kind="cifar100", path=str(arguments.data / "cifar100")), 0)
        images = module.normals().train.images[: arguments.images]
    backbone = Backbone.load(BackboneConfig())
    features = backbone.extract(images, patches=True)
    before = json.loads(arguments.target.read_text()) if arguments.target.is_file() else {}
    about = {"versions": versions.computing(), "threads": arguments.threads, "fitted_to": len(images)}
    result: dict[str, Any] = before | about
    result["scoring"] = scoring(backbone, features, images, arguments.rounds)
    if arguments.anomalib:
        coreset = PatchCore(kind="patchcore").coreset
        result["anomalib"] = anomalib(arguments.anomalib, images[: len(images) // 2], coreset, arguments.rounds)
    if arguments.authors:
        result["step"] = step(features, arguments.authors, backbone, arguments.rounds)
    if arguments.authors and arguments.epochs:
        result["training"] = training(
            arguments.data, arguments.authors, backbone, noise, arguments.normals, arguments.epochs
        )
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.target, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

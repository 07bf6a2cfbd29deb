"""anomalib's PatchCore and PaDiM on our backbone: run by `benchmarks/detectors.py` with the Python of anomalib's venv.

Reads images from a NumPy file, float32 (N, 3, S, S), normalised; prints times as JSON: seconds of a fit, and
scoring of a batch as a multiple of the bare backbone's time, measured in turns in this process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from kka_ray.features import efficientnet

LAYERS = ["eighth", "sixteenth"]
IMAGES, BATCH = 64, 16


class Injected(torch.nn.Module):
    """Our backbone in the place of anomalib's feature extractor."""

    out_dims = (40, 112)

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = efficientnet.load(folder).to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        eighth, sixteenth, _ = self.network(images)
        return dict(zip(LAYERS, (eighth, sixteenth), strict=True))


def main() -> None:
    weights, images, coreset, threads, rounds = sys.argv[1:]
    torch.set_num_threads(int(threads))
    x = torch.from_numpy(np.load(images)).contiguous(memory_format=torch.channels_last)
    backbone = Injected(Path(weights)).eval()
    result = {}
    for name in ("patchcore", "padim"):
        if name == "patchcore":
            model = PatchcoreModel(LAYERS, "resnet18", pre_trained=False)
        else:
            model = PadimModel("resnet18", ["layer1", "layer2"], pre_trained=False, n_features=100)
            model.layers = LAYERS
            model.idx = torch.randperm(152)[:100]
        model.feature_extractor = backbone
        started = time.perf_counter()
        model.train()
        with torch.no_grad():
            for part in x.split(BATCH):
                model(part)
            if name == "patchcore":
                model.subsample_embedding(float(coreset))
            else:
                model.fit()
        fit = time.perf_counter() - started
        model.eval()
        ratios = []
        with torch.inference_mode():
            for _ in range(int(rounds)):
                started = time.perf_counter()
                for part in x[:IMAGES].split(BATCH):
                    backbone(part)
                middle = time.perf_counter()
                for part in x[:IMAGES].split(BATCH):
                    model(part)
                ratios.append((time.perf_counter() - middle) / (middle - started))
        result[name] = {"fit_seconds": fit, "times_backbone": statistics.median(ratios)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""A tuned detector as one ONNX model: images in, scores out, for programs that have neither torch nor this package."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.features.backbone import Backbone
from kka_ray.features.onnx import to_onnx
from kka_ray.files import written


def export_onnx(tuned: TunedDetector, file: Path) -> None:
    """Writes `file`.

    Input `images`: float32 (N, 3, S, S), RGB in 0..255, resized to the backbone's `image_size` S. Output `score`:
    float32 (N,), as `TunedDetector.score_images` gives. The model's metadata say S, the detector, and the threshold,
    median and MAD of the validation normals. Raises ConfigError if ONNX is not installed, the detector has no such form
    or was loaded to be run by ONNX, ResourceError if the file cannot be written.
    """
    if tuned.backbone.engine != "torch":
        raise ConfigError(f"only a detector on the engine torch can be exported, not on {tuned.backbone.engine}")
    with _writing(file):
        _try(file)  # the conversion takes its time
    size, calibration = tuned.backbone.config.image_size, tuned.calibration
    whole = _Whole(tuned.backbone, tuned.detector.network(), tuned.detector.needs_patches)
    content = to_onnx(whole, torch.rand(2, 3, size, size) * 255, ["score"])
    import onnx

    model = onnx.load_from_string(content)
    about = {
        "detector": tuned.config.kind,
        "image_size": size,
        "threshold": calibration.threshold,
        "median": calibration.normal.median,
        "mad": calibration.normal.mad,
    }
    onnx.helper.set_model_props(model, {name: str(value) for name, value in about.items()})
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with written(file) as temporary:
            onnx.save(model, temporary)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot write {file}: {error}; name another file, or make room there") from error


def _try(file: Path) -> None:
    """Raises OSError if a file cannot be made there; leaves nothing."""
    if file.is_dir():
        raise IsADirectoryError("it is a folder")
    there = next(folder for folder in file.absolute().parents if folder.exists())
    tempfile.TemporaryFile(dir=there).close()


class _Whole(nn.Module):
    def __init__(self, backbone: Backbone, detector: nn.Module, patches: bool) -> None:
        super().__init__()
        self.network, self.detector = backbone.network, detector
        self._backbone, self._patches = backbone, patches

    def forward(self, images: Tensor) -> Tensor:
        pooled, grid = self._backbone.forward(images, self._patches)
        return self.detector(pooled) if grid is None else self.detector(pooled, grid.float())

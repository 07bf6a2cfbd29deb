"""A detector that is ready for images: backbone, fitted detector and calibration, in one folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kka_ray.config.models import BackboneConfig, Engine
from kka_ray.config.models import Detector as DetectorConfig
from kka_ray.detectors import build
from kka_ray.detectors.base import Detector
from kka_ray.detectors.training import ALONE, Training
from kka_ray.errors import AssetError, DataError
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.features.pixels import pixels
from kka_ray.features.robust import Robust
from kka_ray.files import sha256, write_json, written

VERSION = 25
"""Part of the store's keys; raised when what is fitted changes, and with it the scores."""
CALIBRATION = 2
"""Likewise part of them; raised when what is read off the scores of validation normals changes."""

_FORMAT = 2
_QUANTILES = np.linspace(0, 1, 201)


@dataclass(frozen=True)
class Scores:
    """What a tuned detector says of N images.

    score: float32 (N,), higher is more anomalous, in the detector's own unit.
    robust_z: float32 (N,), MADs above the median of validation normals.
    percentile: float32 (N,), 0 to 100, the place among the scores of validation normals, interpolated between two of
    them; saturates beyond the worst one.
    anomalous: bool (N,), whether the score exceeds the threshold.
    """

    score: np.ndarray
    robust_z: np.ndarray
    percentile: np.ndarray
    anomalous: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Calibration:
    """The scores of validation normals, summed up."""

    threshold: float
    false_positive_rate: float
    normal: Robust
    quantiles: tuple[float, ...]
    """Scores at 201 equal steps from the least to the largest."""
    heat: Robust | None = None
    """Of the hottest place of each one's heat map; None if the detector does not localise."""

    @classmethod
    def of(cls, scores: np.ndarray, false_positive_rate: float, heat: np.ndarray | None = None) -> Self:
        """Of validation normals' scores (N,) and heat maps (N, h, w), None where there are none.

        The threshold is the score that a new normal image exceeds with at most that probability, if it comes from
        where these come from (the rank of split conformal prediction: Vovk et al., 2005). Of N scores the largest is
        exceeded with 1 / (N + 1): where that is more, it is the threshold.
        """
        values = np.sort(scores.astype(np.float64))
        rank = math.ceil((len(values) + 1) * (1 - false_positive_rate) - 1e-9)
        threshold = float(values[min(max(rank, 1), len(values)) - 1])
        steps = tuple(float(q) for q in np.quantile(values, _QUANTILES))
        hottest = None if heat is None else Robust.of(heat.max((1, 2)))
        return cls(threshold, false_positive_rate, Robust.of(scores), steps, hottest)

    def judge(self, score: np.ndarray) -> Scores:
        """Scores (N,) on the scale of normals."""
        # Of equal quantiles the first, as equal scores are not less.
        steps, first = np.unique(self.quantiles, return_index=True)
        percentile = 100 * np.interp(score, steps, _QUANTILES[first], right=1.0)
        z = self.normal(score).astype(np.float32)
        return Scores(score, z, percentile.astype(np.float32), score > self.threshold)


class TunedDetector:
    """Backbone, detector and calibration. Made by `fit` or `load`."""

    def __init__(
        self, config: DetectorConfig, backbone: Backbone, detector: Detector, calibration: Calibration
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.detector = detector
        self.calibration = calibration

    @classmethod
    def fit(
        cls,
        config: DetectorConfig,
        backbone: Backbone,
        normals_features: Features,
        anomalies_features: Features | None,
        validation_features: Features,
        seed: int,
        false_positive_rate: float,
        training: Training = ALONE,
    ) -> Self:
        """Fits a detector to features that `backbone` extracted, and calibrates it on the validation normals.

        `training` says how gradient steps are run.

        Raises DataError without normals or validation normals, ValueError if the detector needs anomalies or patches
        and there are none.
        """
        for name, features in (("training", normals_features), ("validation", validation_features)):
            if len(features) == 0:
                raise DataError(f"there are no {name} normals to fit the detector {config.kind} with")
        detector = build(config)
        detector.training = training
        detector.fit(normals_features, anomalies_features, validation_features, seed)
        heat = detector.heatmap(validation_features)
        calibration = Calibration.of(detector.score(validation_features), false_positive_rate, heat)
        return cls(config, backbone, detector, calibration)

    def extract(self, images: Sequence[np.ndarray]) -> Features:
        """What the detector reads of uint8 images (H, W, 3) of any sizes; the backbone is run only if it reads that.

        Raises DataError for no images, or others.
        """
        if len(images) == 0:
            raise DataError("there are no images to score")
        if self.detector.needs_pooled or self.detector.needs_patches:
            return self.backbone.extract(images, self.detector.needs_patches, self.detector.needs_pixels)
        return Features.of_pixels(pixels(images))

    def score(self, features: Features) -> Scores:
        """Scores of features that the same backbone extracted."""
        return self.calibration.judge(self.detector.score(features))

    def score_images(self, images: Sequence[np.ndarray]) -> Scores:
        """Scores of uint8 images (H, W, 3) of any sizes. Raises DataError for other images."""
        return self.score(self.extract(images))

    def heatmap(self, features: Features) -> np.ndarray | None:
        """Heat by place, float32 (N, h, w) on the detector's own grid; None if it does not localise.

        In MADs above the median of validation normals' hottest places: about 0 where a typical normal is hottest,
        whatever the detector.
        """
        heat = self.detector.heatmap(features)
        if heat is None or self.calibration.heat is None:
            return None
        return self.calibration.heat(heat).astype(np.float32)

    def heatmap_images(self, images: Sequence[np.ndarray]) -> np.ndarray | None:
        """As `heatmap`, in the size of the images, float32 (N, H, W).

        Raises DataError if the images differ in size: they do not fit one array.
        """
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:
            raise DataError(
                f"heat maps of images of different sizes ({sorted(sizes)[:3]}, ...): pass one size at a time"
            )
        heat = self.heatmap(self.extract(images))
        if heat is None:
            return None
        (size,) = sizes
        scaled = F.interpolate(torch.from_numpy(heat)[:, None], size, mode="bilinear", align_corners=False)
        return scaled[:, 0].numpy()

    def save(self, folder: Path) -> None:
        """Writes `detector.safetensors` and, last, `detector.json`, which says which tensors are its own."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors, state = self.detector.state()
        with written(folder / "detector.safetensors") as file:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            tensors_sha256 = sha256(file)
        values: dict[str, Any] = {
            "format": _FORMAT,
            "detector": self.config.model_dump(mode="json"),
            "backbone": self.backbone.config.model_dump(mode="json"),
            "backbone_identity": self.backbone.identity,
            "calibration": asdict(self.calibration),
            "state": state,
            "tensors_sha256": tensors_sha256,
        }
        write_json(folder / "detector.json", values)

    @classmethod
    def load(
        cls, folder: Path, backbone: Backbone | None = None, device: str = "cpu", engine: Engine = "torch"
    ) -> Self:
        """The inverse of `save`. `backbone` spares loading it again where it is at hand; else it is loaded onto
        `device`, to be run by `engine`.

        Raises AssetError if the folder holds no detector or a damaged one, or if the backbone is not the one that the
        detector was fitted on.
        """
        saved = _read(folder / "detector.json")
        weights = folder / "detector.safetensors"
        try:
            found, tensors = sha256(weights), load_file(weights)
        except (OSError, SafetensorError) as error:
            raise AssetError(f"{folder} holds no readable detector: {error}") from error
        if saved.tensors_sha256 != found:
            raise AssetError(
                f"{folder} holds no readable detector: {weights.name} is not the file that detector.json was written "
                "with. Copy both again from where they are whole, or make them anew by the command of their run"
            )
        backbone = backbone or Backbone.load(saved.backbone, device, engine)
        _check_backbone(folder, backbone, saved.backbone, saved.backbone_identity)
        detector = build(saved.detector).restore(tensors, saved.state)
        return cls(saved.detector, backbone, detector, saved.calibration)


class _Saved(BaseModel):
    """What `detector.json` holds."""

    detector: DetectorConfig
    backbone: BackboneConfig
    backbone_identity: str
    calibration: Calibration
    state: dict[str, Any]
    tensors_sha256: str


def _read(file: Path) -> _Saved:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise AssetError(f"{file.parent} holds no readable detector: {error}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != _FORMAT:
        raise AssetError(f"{file} has format {found}, this version reads {_FORMAT}: fit it again")
    try:
        return _Saved.model_validate(values)
    except ValidationError as error:
        raise AssetError(f"{file} was written by another version of kka_ray: {error}") from error


def _check_backbone(folder: Path, backbone: Backbone, wanted: BackboneConfig, identity: str) -> None:
    if backbone.identity != identity:
        raise AssetError(
            f"the detector in {folder} was fitted on the backbone {wanted.model} with identity {identity[:12]}, but "
            f"{backbone.config.model} has {backbone.identity[:12]}: its scores would mean nothing. Use the backbone "
            "that it was fitted on, or fit the detector again"
        )
    if backbone.config.image_size != wanted.image_size:
        raise AssetError(
            f"the detector in {folder} was fitted on images of {wanted.image_size} px, the backbone given resizes "
            f"to {backbone.config.image_size} px: load it with image_size = {wanted.image_size}"
        )

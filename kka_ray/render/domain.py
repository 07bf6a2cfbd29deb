"""Whether a renderer was trained on anything like the user's images.

A renderer draws what it has seen. If the normals lie far from its training images, its anomalies are far from the
normals for a reason that has nothing to do with what the descriptions say. A sample of the training images' backbone
features lies beside the weights, and the user's normals are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kka_ray.errors import AssetError

FILE = "reference.safetensors"
"""Name of the file with the reference features, beside a pipeline's `model_index.json`."""

THRESHOLD = 3.0
"""`domain_distance` from which normals count as foreign. Measured with EfficientNet-Lite0 at 96 px against 256 drawn
flowers, 21 to 100 images each: other drawn flowers below 1; photographs of flowers (Oxford-102, CIFAR-100) 4.5 to 9;
furniture (CIFAR-100), land use (UC Merced) and magnetic tiles 11 to 13."""

_NEIGHBOURS = 5


SAMPLE = 256
"""Images that are compared, of the training and of the normals, at most."""
LEAST = 2 * _NEIGHBOURS + 2
"""Training images that a reference needs."""
_SIDE = 96
"""`image_size` of the references that do not say theirs."""


@dataclass(frozen=True)
class Reference:
    """Features of a sample of a renderer's training images."""

    pooled: np.ndarray
    """Float32 (N, D), L2-normalised."""
    backbone: str
    """Identity of the backbone that made them."""
    image_size: int
    """Side in pixels that it saw: at another one features differ."""


def save_reference(folder: Path, pooled: np.ndarray, backbone: str, image_size: int, seed: int = 0) -> None:
    """Keeps the pooled features (N, D) of at most `SAMPLE` random training images, in float16; see `Reference`.

    Raises ValueError for fewer than `LEAST` features.
    """
    if len(pooled) < LEAST:
        raise ValueError(f"a reference needs at least {LEAST} features, got {len(pooled)}")
    rows = np.random.default_rng(seed).permutation(len(pooled))[:SAMPLE]
    metadata = {"backbone": backbone, "image_size": str(image_size)}
    save_file({"pooled": pooled[rows].astype(np.float16)}, folder / FILE, metadata=metadata)


def load_reference(folder: Path) -> Reference | None:
    """A renderer's reference; None if its folder holds none, as those of the hub. Raises AssetError if the file is
    damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "numpy") as stored:
            metadata = stored.metadata() or {}
            pooled = stored.get_tensor("pooled").astype(np.float32)
            return Reference(pooled, metadata["backbone"], int(metadata.get("image_size", _SIDE)))
    except (SafetensorError, KeyError, ValueError) as error:
        raise AssetError(f"{file} is damaged ({error}); delete it, or fetch the renderer again") from error


def domain_distance(normals_pooled: np.ndarray, reference_pooled: np.ndarray) -> float:
    """How far normals lie from a renderer's training images; about 0 within its domain.

    For each image the mean cosine distance to its 5 nearest references is taken. The result is the median of the
    normals, in MADs above the median of the references themselves, each against the others. Both arguments are
    L2-normalised pooled features of the same backbone, (N, D) and (M, D) with M > 11. Raises ValueError if D differs.
    """
    if normals_pooled.shape[1] != reference_pooled.shape[1]:
        widths = f"{normals_pooled.shape[1]} and {reference_pooled.shape[1]}"
        raise ValueError(f"features of different backbones: {widths} wide")
    within = 1 - reference_pooled @ reference_pooled.T
    np.fill_diagonal(within, np.inf)  # an image is no neighbour of its own
    inside = _nearest(within)
    outside = _nearest(1 - normals_pooled @ reference_pooled.T)
    middle = np.median(inside)
    spread = max(float(np.median(np.abs(inside - middle))), 1e-6)
    return float((np.median(outside) - middle) / spread)


def domain_warning(normals_pooled: np.ndarray, reference: Reference, name: str, subject: str) -> str | None:
    """What to tell the user if the renderer `name` does not suit the normals; None if it does.

    `normals_pooled` (N, D) are features of the reference's backbone at its image size.
    """
    distance = domain_distance(normals_pooled, reference.pooled)
    if distance < THRESHOLD:
        return None
    return (
        f"the renderer {name} was trained on other images than {subject}: the normals lie {distance:.1f} MADs from "
        f"its training images, more than {THRESHOLD:.1f}, so its anomalies will be easy to tell whatever the text "
        "says. Name a general text-to-image model (render.pipeline=hub:ORG/NAME), edit the normals themselves "
        "(render.mode=img2img), or train a renderer on captioned images of the domain"
    )


def _nearest(distances: np.ndarray) -> np.ndarray:
    return np.sort(distances, axis=1)[:, :_NEIGHBOURS].mean(axis=1)

"""What a data module gives the run: normal images in two disjoint splits, and test images that are opened last."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of them, row by row.

    Images are uint8 (H, W, 3), RGB; sizes may differ. `ids` are unique within a set. `anomalous` is bool (N,).
    """

    ids: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    captions: tuple[str, ...]
    classes: tuple[str, ...]
    anomalous: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | np.ndarray) -> ImageSet:
        """The given rows, in that order."""
        pick = [int(i) for i in rows]
        return ImageSet(
            tuple(self.ids[i] for i in pick),
            tuple(self.images[i] for i in pick),
            tuple(self.captions[i] for i in pick),
            tuple(self.classes[i] for i in pick),
            self.anomalous[pick],
        )

    def pixels_identity(self) -> str:
        """SHA-256 over the images alone, in their order: what their features depend on."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.shape}\0".encode())
            digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    def identity(self) -> str:
        """SHA-256 over ids, pixels and captions: equal sets have equal identities."""
        digest = hashlib.sha256()
        for id_, image, caption in zip(self.ids, self.images, self.captions, strict=True):
            digest.update(f"{id_}\0{image.shape}\0{caption}\0".encode())
            digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Normals:
    """The normal images, split once from a seed, disjoint by content."""

    train: ImageSet
    validation: ImageSet
    dropped: dict[str, int] = field(default_factory=dict)
    """How many files were left out, by reason: `duplicate`, `unreadable`, `too_large`, ..."""


class DataModule(ABC):
    """One data set. Nothing may open a test file before `test` is called."""

    subject: str
    """What the normal images show, in a few words, as in 'household furniture'."""

    normal_terms: tuple[str, ...]
    """Names of the normal class and their synonyms, for the guard; empty where normals differ by attributes only."""

    skipped: Sequence[tuple[str, str]] = ()
    """Files that could not be used, each with the reason; of data sets of files. Grows as splits are read."""

    test_dropped: Mapping[str, int] = MappingProxyType({})
    """Test images left out, by reason: `duplicate` (of a normal image) and, of files, `unreadable` and `too_large`.
    Filled by `test`."""

    @abstractmethod
    def normals(self) -> Normals:
        """The training and validation normals. Raises DataError if there are too few to split."""

    def look(self) -> None:  # noqa: B027  a set without files has none to look for
        """Raises DataError for what `normals` and `test` would miss, as far as names of files tell: in no time."""

    @abstractmethod
    def test(self) -> ImageSet | None:
        """The test images, or None where the data set has none. Images that are also in `normals` are dropped."""


def content_hash(image: np.ndarray) -> str:
    """SHA-256 of an image's shape and pixels, 16 hex digits: copies under other names or encodings are equal."""
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:16]

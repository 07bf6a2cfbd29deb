"""Splits from a seed that cannot leak: duplicates by content go first, then rows, groups or folds are drawn."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from kka_ray.amounts import amount
from kka_ray.data.base import ImageSet, Normals, content_hash
from kka_ray.errors import DataError

MIN_TRAIN = 8
"""Training normals that are needed at least: neighbours and covariances of fewer say nothing."""

MIN_VALIDATION = 2
"""Validation normals that are needed at least: a spread needs two."""

Group = TypeVar("Group", int, str)


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose: streams of one seed are independent of each other."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def drop_duplicates(images: ImageSet) -> tuple[ImageSet, int]:
    """The first of each group of images with equal content, and how many were dropped.

    Raises DataError if two images have one id: splits, captions and scores go by it.
    """
    _check_ids(images)
    first: dict[str, int] = {}
    for row, image in enumerate(images.images):
        first.setdefault(content_hash(image), row)
    return images.take(list(first.values())), len(images) - len(first)


def drop_seen(test: ImageSet, normals: Normals) -> tuple[ImageSet, int]:
    """The test images that are in neither split of the normals, and how many were dropped.

    Raises DataError if two test images have one id.
    """
    _check_ids(test)
    seen = {content_hash(image) for part in (normals.train, normals.validation) for image in part.images}
    keep = [row for row, image in enumerate(test.images) if content_hash(image) not in seen]
    return test.take(keep), len(test) - len(keep)


def _check_ids(images: ImageSet) -> None:
    twice = [id_ for id_, count in Counter(images.ids).items() if count > 1]
    if twice:
        raise DataError(
            f"{amount(len(twice), 'name')} of images given more than once ({twice[0]}, ...): each needs a name "
            "(`source`) of its own, as `kka import` gives it"
        )


def split_normals(
    images: ImageSet, validation: float, seed: int, source: str, dropped: Mapping[str, int] | None = None
) -> Normals:
    """Splits normal images by rows, after duplicates are dropped.

    `validation` is a share of the distinct images where it is below 1, else their number. `dropped` counts what was
    left out before; duplicates are added to it. Rows keep their order. Raises DataError if too few images are left.
    """
    distinct, duplicates = drop_duplicates(images)
    counts = _add(dropped or {}, "duplicate", duplicates)
    wanted = _validation_size(len(distinct), validation)
    if len(distinct) - wanted < MIN_TRAIN:
        enough = least_normals(validation)
        raise too_few(len(distinct), enough, _validation_size(enough, validation), source, counts)
    order = stream(seed, "validation").permutation(len(distinct))
    return Normals(distinct.take(np.sort(order[wanted:])), distinct.take(np.sort(order[:wanted])), counts)


def least_normals(validation: float) -> int:
    """How many distinct images `split_normals` needs."""
    return next(n for n in itertools.count(MIN_TRAIN) if n - _validation_size(n, validation) >= MIN_TRAIN)


def split_by_group(
    images: ImageSet, is_validation: Sequence[bool], source: str, dropped: Mapping[str, int] | None = None
) -> Normals:
    """Splits normal images as `is_validation` says row by row, for splits whose groups must stay together.

    Of duplicates the first row is kept, in whichever part it is. Raises DataError if too few images are left.
    """
    part = dict(zip(images.ids, is_validation, strict=True))
    distinct, duplicates = drop_duplicates(images)
    counts = _add(dropped or {}, "duplicate", duplicates)
    validation = [row for row, id_ in enumerate(distinct.ids) if part[id_]]
    train = [row for row, id_ in enumerate(distinct.ids) if not part[id_]]
    if len(train) < MIN_TRAIN or len(validation) < MIN_VALIDATION:
        parts = f"{source} ({len(train)} to train on, {len(validation)} to validate on)"
        raise too_few(len(distinct), MIN_TRAIN + MIN_VALIDATION, MIN_VALIDATION, parts, counts)
    return Normals(distinct.take(train), distinct.take(validation), counts)


def draw_groups(groups: Iterable[Group], count: int, seed: int, purpose: str) -> set[Group]:
    """`count` of the distinct groups, drawn from the seed; their order in `groups` does not matter."""
    distinct = sorted(set(groups))
    order = stream(seed, purpose).permutation(len(distinct))
    return {distinct[i] for i in order[:count]}


def fold_rows(count: int, folds: int, fold: int, seed: int) -> np.ndarray:
    """The rows of one fold out of `count`, sorted. The folds of a seed are disjoint, of about equal size, and cover
    every row."""
    return np.sort(stream(seed, "folds").permutation(count)[fold::folds])


def too_few(count: int, enough: int, validation: int, source: str, dropped: Mapping[str, int]) -> DataError:
    """The error that says how many distinct normals there are, how many are `enough` and for what, and what was left
    out."""
    left_out = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
    return DataError(
        f"{source}: {amount(count, 'distinct normal image')} cannot be split; at least {enough} are needed "
        f"({enough - validation} to train on and {validation} to validate on)"
        f"{f'. Left out: {left_out}' if left_out else ''}. Add normal images or change the split"
    )


def _validation_size(count: int, validation: float) -> int:
    """How many of `count` images validate: see `split_normals`."""
    return int(validation) if validation >= 1 else max(MIN_VALIDATION, round(validation * count))


def _add(counts: Mapping[str, int], reason: str, number: int) -> dict[str, int]:
    out = dict(counts)
    out[reason] = out.get(reason, 0) + number
    return out

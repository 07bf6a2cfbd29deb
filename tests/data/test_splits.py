from dataclasses import replace

import numpy as np
import pytest

from kka_ray.data.base import ImageSet, Normals, content_hash
from kka_ray.data.splits import (
    MIN_TRAIN,
    MIN_VALIDATION,
    draw_groups,
    drop_duplicates,
    drop_seen,
    fold_rows,
    split_by_group,
    split_normals,
    stream,
)
from kka_ray.errors import DataError


def image_set(numbers, prefix: str = "n") -> ImageSet:
    """An image of noise for each number; equal numbers give equal images."""
    images = tuple(np.random.default_rng(n).integers(0, 256, (4, 4, 3), dtype=np.uint8) for n in numbers)
    ids = tuple(f"{prefix}{i}" for i in range(len(images)))
    return ImageSet(ids, images, ids, ids, np.zeros(len(images), bool))


def hashes(images: ImageSet) -> set[str]:
    return {content_hash(image) for image in images.images}


def test_streams_repeat_and_differ():
    draws = [stream(s, p).integers(1 << 60) for s, p in [(0, "a"), (0, "a"), (0, "b"), (1, "a")]]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_duplicates_keep_the_first():
    kept, dropped = drop_duplicates(image_set([5, 6, 5, 7, 6]))
    assert kept.ids == ("n0", "n1", "n3")
    assert dropped == 2


def test_two_images_of_one_name_are_refused():
    images = replace(image_set([5, 6, 7]), ids=("a", "b", "a"))
    with pytest.raises(DataError, match=r"1 name of images given more than once \(a"):
        drop_duplicates(images)
    normals = Normals(image_set([1]), image_set([2]))
    with pytest.raises(DataError, match="given more than once"):
        drop_seen(images, normals)


@pytest.mark.parametrize(("validation", "expected"), [(0.2, 8), (0.01, MIN_VALIDATION), (13, 13)])
def test_split_is_disjoint_whole_and_of_the_size_asked_for(validation, expected):
    images = image_set([*range(40), 3, 3])
    split = split_normals(images, validation, 0, "set")
    assert len(split.validation) == expected
    assert len(split.train) == 40 - expected
    assert not hashes(split.train) & hashes(split.validation)
    assert hashes(split.train) | hashes(split.validation) == hashes(images)
    assert split.dropped == {"duplicate": 2}


def test_split_follows_the_seed():
    images = image_set(range(40))
    first, again, other = (split_normals(images, 0.2, seed, "set") for seed in (0, 0, 1))
    assert first.train.identity() == again.train.identity()
    assert first.validation.ids != other.validation.ids


def test_smallest_set_that_can_be_split():
    smallest = MIN_TRAIN + MIN_VALIDATION
    assert len(split_normals(image_set(range(smallest)), 0.2, 0, "set").train) == MIN_TRAIN
    with pytest.raises(DataError, match=rf"photos: {smallest - 1} distinct .* at least {smallest} are needed"):
        split_normals(image_set(range(smallest - 1)), 0.2, 0, "photos")


def test_number_in_the_error_is_enough_and_one_less_is_not():
    with pytest.raises(DataError, match="at least 16 are needed"):
        split_normals(image_set([0]), 0.5, 0, "set")
    split_normals(image_set(range(16)), 0.5, 0, "set")
    with pytest.raises(DataError, match="at least 16 are needed"):
        split_normals(image_set(range(15)), 0.5, 0, "set")


def test_error_counts_what_was_left_out():
    with pytest.raises(DataError, match="at least 258 are needed .*Left out: 4 unreadable, 19 duplicate"):
        split_normals(image_set([1] * 20), 250, 0, "set", {"unreadable": 4})


def test_split_by_group_needs_both_parts():
    images = image_set(range(20))
    split = split_by_group(images, [i < 5 for i in range(20)], "set", {"border": 1})
    assert split.validation.ids == images.ids[:5]
    assert split.dropped == {"border": 1, "duplicate": 0}
    with pytest.raises(DataError, match="at least 10 are needed"):
        split_by_group(images, [False] * 20, "set")


def test_split_by_group_keeps_one_copy_across_the_parts():
    images = image_set([*range(20), 0])
    split = split_by_group(images, [i >= 15 for i in range(21)], "set")
    assert "n20" not in split.validation.ids
    assert not hashes(split.train) & hashes(split.validation)


def test_groups_do_not_depend_on_the_order():
    names = [f"g{i}" for i in range(30)]
    drawn = draw_groups(names, 7, 0, "x")
    assert len(drawn) == 7
    assert drawn == draw_groups(names[::-1] * 2, 7, 0, "x")
    assert drawn != draw_groups(names, 7, 1, "x")


def test_folds_cover_every_row_once():
    folds = [fold_rows(41, 5, fold, 3) for fold in range(5)]
    assert sorted(np.concatenate(folds)) == list(range(41))
    assert {len(f) for f in folds} == {8, 9}


def test_test_images_seen_among_the_normals_are_dropped():
    normals = Normals(image_set([1, 2]), image_set([3]))
    kept, dropped = drop_seen(image_set([9, 3, 1, 8], "t"), normals)
    assert kept.ids == ("t0", "t3")
    assert dropped == 2

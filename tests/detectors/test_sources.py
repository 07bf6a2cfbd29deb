from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from kka_ray.config.models import Control, DetectConfig
from kka_ray.data.decode import encode_png
from kka_ray.detectors.genias import source
from kka_ray.detectors.outside import draw
from kka_ray.detectors.sources import KINDS, SOURCES, make
from kka_ray.errors import ConfigError, DataError
from kka_ray.report.wording import ARMS


def _normals(count: int = 6, shape: tuple[int, ...] = (32, 32, 3)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (37, 50, 3), (33, 20)])
def test_images_are_new_of_the_same_size_and_repeat(kind, shape):
    normals = _normals(shape=shape)
    before = [n.copy() for n in normals]
    made = make(kind, normals, 10, seed=3)
    assert len(made) == 10
    assert all(m.shape == shape and m.dtype == np.uint8 for m in made)
    assert all(np.array_equal(a, b) for a, b in zip(normals, before, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(made, make(kind, normals, 10, seed=3), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(made, make(kind, normals, 10, seed=4), strict=True))
    assert not any(np.array_equal(m, n) for m in made for n in normals)


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "mixup"])
def test_normals_are_not_repeated_while_there_are_enough(kind):
    # Each normal has a brightness of its own, which every source leaves nearly as it is.
    normals = [np.full((32, 32, 3), 30 + 20 * i, np.uint8) for i in range(10)]
    levels = {round((float(np.median(m)) - 30) / 20) for m in make(kind, normals, 10, seed=0)}
    assert levels == set(range(10))


def test_noise_has_a_deviation_of_40():
    (image,) = make("noise", [np.full((200, 200, 3), 128, np.uint8)], 1, seed=0)
    assert abs(float(image.std()) - 40) < 1


def test_cutpaste_changes_one_rectangle_with_pixels_of_another():
    black, white = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 255, np.uint8)
    for image in make("cutpaste", [black, white], 20, seed=0):
        odd = image[..., 0] != np.median(image)
        rows, columns = np.flatnonzero(odd.any(1)), np.flatnonzero(odd.any(0))
        assert odd.sum() == len(rows) * len(columns)
        assert np.ptp(rows) + 1 == len(rows)
        assert np.ptp(columns) + 1 == len(columns)
        assert 0.01 < odd.mean() < 0.2


def test_shuffling_keeps_the_pixels():
    (normal,) = _normals(1)
    (image,) = make("patch_shuffle", [normal], 1, seed=0)
    assert np.array_equal(np.sort(image, axis=None), np.sort(normal, axis=None))


def test_blurring_smooths():
    (normal,) = _normals(1)
    (image,) = make("blur", [normal], 1, seed=0)
    assert np.abs(np.diff(image.astype(int), axis=0)).mean() < 0.2 * np.abs(np.diff(normal.astype(int), axis=0)).mean()


def test_swapping_takes_a_quarter_of_another_normal_from_the_same_places():
    first, second = _normals(2)
    for image in make("patch_swap", [first, second], 6, seed=0):
        of_first, of_second = (image == first).all(2), (image == second).all(2)
        assert (of_first ^ of_second).all()
        assert min(of_first.mean(), of_second.mean()) == 0.25


def test_mixing_lies_between_two_normals():
    dark, bright = np.full((8, 8, 3), 50, np.uint8), np.full((8, 8, 3), 150, np.uint8)
    levels = [int(image[0, 0, 0]) for image in make("mixup", [dark, bright], 30, seed=0)]
    assert min(levels) >= 80
    assert max(levels) <= 120
    assert len(set(levels)) > 10


def test_perlin_changes_connected_parts_of_5_to_30_percent():
    dark, bright = np.full((64, 64, 3), 40, np.uint8), np.full((64, 64, 3), 180, np.uint8)
    for image in make("perlin", [dark, bright], 20, seed=0):
        odd = image[..., 0] != np.median(image)
        assert 0.04 < odd.mean() < 0.31
        # Noise of single pixels would have nearly two borders a changed pixel.
        assert np.abs(np.diff(odd.astype(int), axis=1)).sum() < 0.6 * odd.sum()


def test_other_normals_may_have_other_sizes():
    normals = [*_normals(1, (32, 32, 3)), *_normals(1, (40, 24, 3))]
    for kind in SOURCES:
        assert sorted(image.shape for image in make(kind, normals, 2, seed=0)) == [(32, 32, 3), (40, 24, 3)]


def test_outside_images_come_from_files_or_parquet_without_repeats(tmp_path):
    pictures = _normals(6, (5, 7, 3))
    (tmp_path / "files" / "deep").mkdir(parents=True)
    (tmp_path / "table").mkdir()
    for i, picture in enumerate(pictures):
        (tmp_path / "files" / ("deep" if i % 2 else "") / f"{i}.png").write_bytes(encode_png(picture))
    rows = [{"image": encode_png(p), "source": str(i)} for i, p in enumerate(pictures)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table" / "train-0.parquet")
    for folder in ("files", "table"):
        drawn = [image.tobytes() for image in draw(tmp_path / folder, 4, seed=1)]
        assert len(set(drawn)) == 4
        assert set(drawn) <= {p.tobytes() for p in pictures}
        assert set(drawn) != {image.tobytes() for image in draw(tmp_path / folder, 4, seed=3)}
        with pytest.raises(DataError, match="holds 6 images, but 7"):
            draw(tmp_path / folder, 7, seed=0)
    with pytest.raises(DataError, match="no folder"):
        draw(tmp_path / "none", 1, seed=0)
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "table" / "train-1.parquet")
    with pytest.raises(DataError, match="2 rows have a source that another has"):
        draw(tmp_path / "table", 4, seed=1)


def test_an_outside_image_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "private.png").write_bytes(encode_png(_normals(1, (5, 7, 3))[0]))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"private\.png cannot be read \(.*Permission denied"):
        draw(tmp_path, 1, seed=0)


def test_every_control_can_be_made_and_is_named():
    assert set(get_args(Control)) == {*KINDS, "outside", "drawn_normals", "normal_views"} <= set(ARMS)
    with pytest.raises(ValidationError, match="detect.outside"):
        DetectConfig(controls=("outside",))


def test_genias_changes_normals_of_any_size_and_repeats(monkeypatch):
    monkeypatch.setattr(source, "_STEPS", 60)
    rng = np.random.default_rng(0)
    shapes = [(32, 32, 3), (37, 50, 3), (33, 20)] * 5
    normals = [np.full(shape, rng.integers(40, 216), np.uint8) for shape in shapes]
    before = [n.copy() for n in normals]
    made, again = (make("genias", normals, 15, seed=3) for _ in range(2))
    assert sorted(m.shape for m in made) == sorted(shapes)
    assert all(m.dtype == np.uint8 for m in made)
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(normals, before, strict=True))
    assert sum(np.ptp(m) > 0 for m in made) > 5  # the normals are flat


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="noise, cutpaste, blur, patch_shuffle"):
        make("sepia", _normals(), 1, 0)
    with pytest.raises(DataError, match="none"):
        make("noise", [], 1, 0)
    with pytest.raises(DataError, match="too small"):
        make("patch_shuffle", _normals(1, (3, 3, 3)), 1, 0)
    assert make("noise", _normals(), 0, 0) == []

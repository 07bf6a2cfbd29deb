import numpy as np
import pytest

from kka_ray.config.models import MagneticTileData
from kka_ray.data import open_data
from kka_ray.data.base import content_hash
from kka_ray.errors import ConfigError, DataError

CLASSES = ("free", "blowhole", "break")


def row(picture, group, exposure, label):
    return {
        "image": picture(1000 * group + exposure, 4),
        "label": label,
        "class_name": CLASSES[label],
        "source": f"{group}/{exposure}.jpg",
        "group": f"tile{group:03d}",
    }


@pytest.fixture
def folder(tmp_path, picture, write_rows):
    """40 free tiles of three exposures, 10 with a defect, 5 with a free and a broken exposure."""
    rows = [row(picture, g, e, 0) for g in range(40) for e in range(3)]
    rows += [row(picture, g, e, 1) for g in range(40, 50) for e in range(2)]
    rows += [row(picture, g, e, 2 * e) for g in range(50, 55) for e in range(2)]
    write_rows(tmp_path / "all-00000-of-00001.parquet", rows)
    return tmp_path


def config(folder, **changes):
    return MagneticTileData(**{"kind": "magnetic_tile", "path": str(folder), **changes})


def groups(images):
    return {int(id_.split("/")[0]) for id_ in images.ids}


@pytest.mark.parametrize("seed", range(3))
def test_tiles_stay_together_and_mixed_ones_are_for_testing(folder, seed):
    data = open_data(config(folder), seed)
    normals, test = data.normals(), data.test()
    parts = [groups(normals.train), groups(normals.validation), groups(test)]
    assert [len(p) for p in parts] == [24, 6, 10 + 10 + 5]
    assert set.union(*parts) == set(range(55))
    assert parts[0] | parts[1] < set(range(40))
    assert not normals.train.anomalous.any()
    assert not normals.validation.anomalous.any()
    assert test.anomalous.sum() == 20 + 5
    assert (~test.anomalous).sum() == 30 + 5
    assert set(test.classes) == set(CLASSES)


def test_repeats_by_seed(folder):
    first, again, other = (open_data(config(folder), seed) for seed in (0, 0, 1))
    assert first.normals().train.identity() == again.normals().train.identity()
    assert first.test().identity() == again.test().identity()
    assert first.normals().train.ids != other.normals().train.ids


def test_copies_of_normals_are_not_tested_on(folder, picture, write_rows):
    rows = [row(picture, g, 0, 0) for g in range(40)] + [row(picture, 60, 0, 1)]
    copies = [{**r, "source": f"99/{i}.jpg", "group": "tile099", "label": 1} for i, r in enumerate(rows[:40])]
    write_rows(folder / "all-00000-of-00001.parquet", rows + copies)
    data = open_data(config(folder), 0)
    seen = {content_hash(x) for part in (data.normals().train, data.normals().validation) for x in part.images}
    test = data.test()
    assert not seen & {content_hash(x) for x in test.images}
    assert data.test_dropped == {"duplicate": 30}


def test_shares_that_leave_nothing(folder):
    with pytest.raises(ConfigError, match="leave no tile"):
        open_data(config(folder, test=0.5, validation=0.5), 0)


def test_without_free_tiles(folder, picture, write_rows):
    write_rows(folder / "all-00000-of-00001.parquet", [row(picture, g, e, e) for g in range(9) for e in range(2)])
    with pytest.raises(DataError, match="normal pictures only"):
        open_data(config(folder), 0).normals()


def test_real_set(real_data):
    data = open_data(config(real_data / "magnetic_tile"), 0)
    normals, test = data.normals(), data.test()
    assert 400 < len(normals.train) < 700
    assert int(test.anomalous.sum()) == 392
    assert np.ptp([x.shape[0] for x in test.images]) > 0

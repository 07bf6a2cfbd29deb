import numpy as np
import pytest

from kka_ray.config.models import Oxford102Data
from kka_ray.data import open_data
from kka_ray.data.base import content_hash
from kka_ray.errors import ConfigError, DataError


def rows_of(picture, split, label, name, numbers):
    return [
        {"image": picture(n), "label": label, "class_name": name, "split": split, "source": f"jpg/{split}-{n}.jpg"}
        for n in numbers
    ]


@pytest.fixture
def folder(tmp_path, picture, write_rows):
    """20 poppies in either file, the last of the second a copy from the first; 5 and 12 roses."""
    train = rows_of(picture, "train", 25, "corn poppy", range(20)) + rows_of(picture, "train", 3, "rose", range(50, 55))
    test = rows_of(picture, "test", 25, "corn poppy", [*range(20, 39), 0])
    test += rows_of(picture, "test", 3, "rose", range(100, 112))
    write_rows(tmp_path / "train-00000-of-00001.parquet", train)
    write_rows(tmp_path / "test-00000-of-00001.parquet", test)
    return tmp_path


def config(folder, **changes):
    return Oxford102Data(**{"kind": "oxford102", "path": str(folder), "folds": 4, **changes})


def hashes(images):
    return {content_hash(image) for image in images.images}


def test_folds_share_out_the_species(folder):
    held_out = []
    for fold in range(4):
        data = open_data(config(folder, fold=fold), 0)
        normals, test = data.normals(), data.test()
        seen = hashes(normals.train) | hashes(normals.validation)
        assert not hashes(normals.train) & hashes(normals.validation)
        assert not seen & hashes(test)
        assert normals.dropped == {"duplicate": 1}
        assert int(test.anomalous.sum()) == 12
        normal = test.take(np.flatnonzero(~test.anomalous))
        assert len(seen) + len(normal) == 39
        held_out += normal.ids
    assert len(held_out) == len(set(held_out)) == 39


def test_subject_terms_and_captions(folder):
    data = open_data(config(folder), 0)
    assert data.subject == "corn poppy flowers"
    assert data.normal_terms[0] == "corn poppy"
    captions = data.normals().train.captions
    assert all("corn poppy" in c for c in captions)
    assert len(set(captions)) >= 3


def test_repeats_by_seed(folder):
    first, again, other = (open_data(config(folder), seed) for seed in (0, 0, 1))
    assert first.normals().train.identity() == again.normals().train.identity()
    assert first.test().identity() == again.test().identity()
    assert first.test().ids != other.test().ids


def test_no_anomaly_is_read_before_test(folder, picture, write_rows):
    test = rows_of(picture, "test", 25, "corn poppy", range(20, 40))
    test += [{**r, "image": b"garbage"} for r in rows_of(picture, "test", 3, "rose", range(100, 112))]
    write_rows(folder / "test-00000-of-00001.parquet", test)
    data = open_data(config(folder), 0)
    assert len(data.normals().train) > 20
    with pytest.raises(DataError, match=r"jpg/test-100\.jpg"):
        data.test()


def test_fold_that_is_not_there(folder):
    with pytest.raises(ConfigError, match="no fold 4 of 4"):
        open_data(config(folder, fold=4), 0)


def test_more_folds_than_images(folder):
    assert len(open_data(config(folder, folds=39, fold=38), 0).normals().train) > 20
    with pytest.raises(DataError, match="39 distinct images, of which fold 39 of 40 has none.*folds to 39 at most"):
        open_data(config(folder, folds=40, fold=39), 0).normals()


def test_species_that_is_not_there(folder):
    with pytest.raises(DataError, match="label 77"):
        open_data(config(folder, label=77), 0)


def test_species_that_is_too_small(folder):
    with pytest.raises(DataError, match=r"label 3, outside fold 0: \d+ distinct normal.*at least 10 are needed"):
        open_data(config(folder, label=3, folds=2), 0).normals()


@pytest.mark.slow
def test_real_set(real_data):
    data = open_data(Oxford102Data(kind="oxford102", path=str(real_data / "oxford102")), 0)
    normals, test = data.normals(), data.test()
    held_out = int((~test.anomalous).sum())
    assert len(normals.train) + len(normals.validation) + held_out == 41
    assert int(test.anomalous.sum()) == 6149 - 21

import numpy as np
import pytest

from kka_ray.config.models import UcmData
from kka_ray.data import open_data
from kka_ray.data.base import content_hash
from kka_ray.errors import ConfigError, DataError


def rows_of(picture, label, name, numbers):
    return [
        {
            "image": picture(n, 4),
            "label": label,
            "class_name": name,
            "source": f"{name}/{n}.tif",
            "captions": [f"Picture {n}, sentence {i}." for i in range(5)],
            "caption_id": n,
        }
        for n in numbers
    ]


@pytest.fixture
def folder(tmp_path, picture, write_rows):
    """The numbering of the real set: the last ten of a class are its test pictures."""
    train = rows_of(picture, 19, "storagetanks", range(1901, 1991)) + rows_of(
        picture, 20, "tenniscourt", range(2001, 2091)
    )
    test = rows_of(picture, 19, "storagetanks", range(1991, 2001)) + rows_of(
        picture, 20, "tenniscourt", range(2091, 2101)
    )
    write_rows(tmp_path / "train-00000-of-00001.parquet", train + rows_of(picture, 7, "forest", range(701, 705)))
    write_rows(tmp_path / "test-00000-of-00001.parquet", test + rows_of(picture, 7, "forest", range(791, 801)))
    return tmp_path


def config(folder, **changes):
    return UcmData(**{"kind": "ucm_captions", "path": str(folder), **changes})


def numbers(images):
    return {int(id_.split("/")[1][:-4]) for id_ in images.ids}


def hashes(images):
    return {content_hash(image) for image in images.images}


@pytest.mark.parametrize("seed", range(4))
def test_no_scene_and_no_neighbours_in_two_parts(folder, seed):
    data = open_data(config(folder), seed)
    normals, test = data.normals(), data.test()
    parts = [numbers(normals.train), numbers(normals.validation), numbers(test.take(np.flatnonzero(~test.anomalous)))]
    for i, part in enumerate(parts):
        for other in parts[i + 1 :]:
            assert not {(n - 1) // 10 for n in part} & {(n - 1) // 10 for n in other}
            # 2000 and 2001 follow each other, but belong to different classes.
            near = {(a, b) for a in part for b in other if abs(a - b) == 1}
            assert near <= {(2000, 2001), (2001, 2000)}
    assert sum(map(len, parts)) + normals.dropped["border"] == 200
    assert not hashes(normals.train) & hashes(normals.validation)


def test_shares_of_the_scenes(folder):
    data = open_data(config(folder, test=0.3, validation=0.3), 0)
    test = data.test()
    held_out = [(n - 1) // 10 for n in numbers(test.take(np.flatnonzero(~test.anomalous)))]
    assert len(set(held_out)) == 6
    assert {199, 209} <= set(held_out)
    assert len({(n - 1) // 10 for n in numbers(data.normals().validation)}) == 4
    assert test.classes.count("forest") == int(test.anomalous.sum()) == 10


def test_both_classes_are_in_every_part(folder):
    data = open_data(config(folder), 0)
    normals, test = data.normals(), data.test()
    for part in (normals.train, normals.validation, test):
        assert {"storagetanks", "tenniscourt"} <= set(part.classes)


def test_captions_are_drawn_from_the_five(folder):
    first, other = (open_data(config(folder), seed).normals().train for seed in (0, 1))
    texts = dict(zip(first.ids, first.captions, strict=True))
    assert all(t.startswith(f"Picture {i.split('/')[1][:-4]}, sentence ") for i, t in texts.items())
    assert len({t[-2] for t in texts.values()}) == 5
    assert any(texts.get(i, t) != t for i, t in zip(other.ids, other.captions, strict=True))


def test_repeats_by_seed(folder):
    first, again, other = (open_data(config(folder), seed) for seed in (0, 0, 1))
    assert first.normals().train.identity() == again.normals().train.identity()
    assert first.test().identity() == again.test().identity()
    assert first.normals().train.ids != other.normals().train.ids


def test_no_test_file_is_opened_before_test(folder):
    (folder / "test-00000-of-00001.parquet").write_bytes(b"garbage")
    data = open_data(config(folder), 0)
    assert data.subject == "aerial views of storage tanks and tennis courts"
    data.look()
    assert len(data.normals().train) > 50
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        data.test()


def test_a_test_file_that_is_missing_is_named_by_a_look(folder):
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"has no test-\*\.parquet"):
        open_data(config(folder), 0).look()


@pytest.mark.parametrize("labels", [(), (21,), (-1,), (19, 19)])
def test_impossible_labels(folder, labels):
    with pytest.raises(ConfigError, match=r"data\.labels"):
        open_data(config(folder, labels=labels), 0)


def test_class_that_is_not_there(folder):
    with pytest.raises(DataError, match="label 4"):
        open_data(config(folder, labels=(4,)), 0).normals()


def test_class_that_is_too_small(folder):
    with pytest.raises(DataError, match="at least 10 are needed"):
        open_data(config(folder, labels=(7,)), 0).normals()


def test_row_without_captions(folder, picture, write_rows):
    rows = rows_of(picture, 19, "storagetanks", range(1901, 1991))
    write_rows(folder / "train-00000-of-00001.parquet", [{**r, "captions": []} for r in rows])
    with pytest.raises(DataError, match="has no caption"):
        open_data(config(folder, labels=(19,)), 0).normals()


def test_real_set(real_data):
    data = open_data(UcmData(kind="ucm_captions", path=str(real_data / "ucm_captions")), 0)
    normals, test = data.normals(), data.test()
    held_out = int((~test.anomalous).sum())
    assert len(normals.train) + len(normals.validation) + held_out + normals.dropped["border"] == 200
    assert held_out >= 40
    assert int(test.anomalous.sum()) == 190
    assert any("tank" in c for c in normals.train.captions)

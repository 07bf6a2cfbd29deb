import pytest

from kka_ray.config.models import Cifar100Data
from kka_ray.data import open_data
from kka_ray.data.base import content_hash
from kka_ray.data.cifar100 import SUPERCLASSES
from kka_ray.data.parquet import read_rows, shards
from kka_ray.errors import ConfigError, DataError


def row(picture, number, split, class_name, superclass, prefix=""):
    return {
        "image": picture(number),
        "label": 0,
        "class_name": class_name,
        "superclass": superclass,
        "split": split,
        "source": f"{split}/{class_name}/{prefix}{number}.png",
    }


@pytest.fixture
def folder(tmp_path, picture, write_rows):
    """30 distinct normals and one copy in two train files; a test file with 5 normals, 6 anomalies, 2 leaks."""
    names = SUPERCLASSES["household_furniture"]
    train = [row(picture, n, "train", names[n % 5], "household_furniture") for n in range(30)]
    train += [row(picture, 3, "train", "bed", "household_furniture", "copy-")]
    train += [row(picture, 100 + n, "train", "oak_tree", "trees") for n in range(4)]
    write_rows(tmp_path / "train-00000-of-00002.parquet", train[:20])
    write_rows(tmp_path / "train-00001-of-00002.parquet", train[20:])
    test = [row(picture, 200 + n, "test", names[n], "household_furniture") for n in range(5)]
    test += [row(picture, 300 + n, "test", "oak_tree", "trees") for n in range(6)]
    test += [row(picture, 7, "test", "bed", "household_furniture"), row(picture, 8, "test", "oak_tree", "trees")]
    write_rows(tmp_path / "test-00000-of-00001.parquet", test)
    return tmp_path


def config(folder, **changes):
    return Cifar100Data(**{"kind": "cifar100", "path": str(folder), "validation": 10, **changes})


def hashes(images):
    return {content_hash(image) for image in images.images}


def test_split_and_duplicates(folder):
    normals = open_data(config(folder), 0).normals()
    assert (len(normals.train), len(normals.validation)) == (20, 10)
    assert normals.dropped == {"duplicate": 1}
    assert set(normals.train.classes) <= set(SUPERCLASSES["household_furniture"])
    assert not normals.train.anomalous.any()
    assert not hashes(normals.train) & hashes(normals.validation)


def test_test_rows_without_copies_of_the_normals(folder):
    data = open_data(config(folder), 0)
    test, normals = data.test(), data.normals()
    assert (len(test), int(test.anomalous.sum())) == (11, 6)
    assert data.test_dropped == {"duplicate": 2}
    assert not hashes(test) & (hashes(normals.train) | hashes(normals.validation))
    assert {test.classes[i] for i in range(11) if test.anomalous[i]} == {"oak_tree"}


def test_repeats_by_seed(folder):
    first, again, other = (open_data(config(folder), seed).normals() for seed in (0, 0, 1))
    assert first.train.identity() == again.train.identity()
    assert first.validation.ids != other.validation.ids


def test_captions_name_the_class_in_several_ways(folder):
    data = open_data(config(folder), 0)
    train, test = data.normals().train, data.test()
    assert all(name in text for name, text in zip(train.classes, train.captions, strict=True))
    assert len({t.replace(c, "X") for c, t in zip(train.classes, train.captions, strict=True)}) >= 4
    trees = [t for c, t in zip(test.classes, test.captions, strict=True) if c == "oak_tree"]
    assert all("an oak tree" in t and "room" not in t for t in trees)


def test_terms_hold_names_and_synonyms(folder):
    data = open_data(config(folder), 0)
    assert data.subject == "household furniture"
    assert {"bed", "chair", "couch", "table", "wardrobe", "sofa", "stool", "armoire"} <= set(data.normal_terms)


def test_no_test_file_is_opened_before_test(folder):
    (folder / "test-00000-of-00001.parquet").write_bytes(b"garbage")
    data = open_data(config(folder), 0)
    data.look()
    assert len(data.normals().train) == 20
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet cannot be read as Parquet"):
        data.test()


def test_missing_files_are_named(folder, tmp_path):
    (folder / "test-00000-of-00001.parquet").unlink()
    data = open_data(config(folder), 0)
    data.normals()
    for wanted in (data.test, data.look):
        with pytest.raises(DataError, match=r"has no test-\*\.parquet; name a folder .* in a run as data\.path"):
            wanted()
    with pytest.raises(DataError, match=r"nowhere is not a folder.*train-\*\.parquet"):
        open_data(config(tmp_path / "nowhere"), 0).look()


def test_too_few_for_the_validation_asked_for(folder):
    with pytest.raises(DataError, match="30 distinct normal.*at least 38 are needed"):
        open_data(config(folder, validation=30), 0).normals()


def test_unknown_superclass(folder):
    with pytest.raises(ConfigError, match="no 'chairs'; it has aquatic_mammals"):
        open_data(config(folder, superclass="chairs"), 0)


def test_damaged_row_is_named(folder, picture, write_rows):
    rows = [row(picture, n, "train", "bed", "household_furniture") for n in range(30)]
    rows[4]["image"] = rows[4]["image"][:40]
    write_rows(folder / "train-00000-of-00002.parquet", rows)
    with pytest.raises(DataError, match=r"train/bed/4\.png"):
        open_data(config(folder), 0).normals()


def test_lacking_column_is_named(folder, write_rows):
    write_rows(folder / "train-00000-of-00002.parquet", [{"image": b"", "label": 0}])
    with pytest.raises(DataError, match=r"train-00000-of-00002\.parquet lacks columns: class_name, source"):
        open_data(config(folder), 0).normals()


def test_real_normals(real_data):
    path = real_data / "cifar100"
    normals = open_data(Cifar100Data(kind="cifar100", path=str(path)), 0).normals()
    assert (len(normals.train), len(normals.validation)) == (1000, 250)
    assert normals.dropped == {"duplicate": 0}
    found: dict[str, set[str]] = {}
    for r in read_rows(shards(path, "train"), ["superclass", "class_name"]):
        found.setdefault(r["superclass"], set()).add(r["class_name"])
    assert {k: set(v) for k, v in SUPERCLASSES.items()} == found


@pytest.mark.slow
def test_real_test_rows(real_data):
    data = open_data(Cifar100Data(kind="cifar100", path=str(real_data / "cifar100")), 0)
    test = data.test()
    assert (len(test), int((~test.anomalous).sum())) == (10_000, 500)
    assert len(set(test.ids)) == 10_000

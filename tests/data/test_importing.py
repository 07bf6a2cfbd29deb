"""Sets as their authors publish them, a few pictures each, through `kka import` into the modules that read them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat
from typer.testing import CliRunner

from kka_ray import cli
from kka_ray.config.models import Cifar100Data, MagneticTileData, Oxford102Data, UcmData
from kka_ray.data import importing, open_data, published
from kka_ray.data.cifar100 import SUPERCLASSES
from kka_ray.data.decode import decode
from kka_ray.data.importing import import_set
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.data.published import FLOWERS, UC_MERCED, magnetic_tile
from kka_ray.errors import ConfigError, DataError, ResourceError

FINE = sorted(name for names in SUPERCLASSES.values() for name in names)
GROUPS = list(SUPERCLASSES)
GROUP_OF = {name: group for group, names in SUPERCLASSES.items() for name in names}


def rows(folder, split, *columns):
    return read_rows(shards(folder, split), [*columns, "image", "source"])


def noise(number, *shape):
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def put(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def record(name, image):
    """A picture of CIFAR-100's binary version: superclass, class, then the three planes."""
    return bytes([GROUPS.index(GROUP_OF[name]), FINE.index(name)]) + image.transpose(2, 0, 1).tobytes()


@pytest.fixture
def cifar(tmp_path):
    """Twelve beds and chairs and two wolves to train on, a chair and a wolf to test on."""
    folder = tmp_path / "in" / "cifar-100-binary"
    folder.mkdir(parents=True)
    names = ["bed", "chair"] * 6 + ["wolf"] * 2
    (folder / "train.bin").write_bytes(b"".join(record(n, noise(i, 32, 32, 3)) for i, n in enumerate(names)))
    (folder / "test.bin").write_bytes(record("chair", noise(50, 32, 32, 3)) + record("wolf", noise(51, 32, 32, 3)))
    return tmp_path / "in"


def test_cifar100_as_the_module_reads_it(cifar, tmp_path):
    seen = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    assert import_set("cifar100", cifar, tmp_path / "out", progress=progress) == {"train": 14, "test": 2}
    assert seen == [(14, 16), (16, 16)]
    config = Cifar100Data(kind="cifar100", path=str(tmp_path / "out"), superclass="household_furniture", validation=2)
    data = open_data(config, 0)
    normals, test = data.normals(), data.test()
    assert (len(normals.train), len(normals.validation)) == (10, 2)
    assert set(normals.train.classes) == {"bed", "chair"}
    assert test.classes == ("chair", "wolf")
    assert test.anomalous.tolist() == [False, True]
    np.testing.assert_array_equal(test.images[0], noise(50, 32, 32, 3))
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_cifar10_has_five_files_to_train_on(tmp_path):
    for n in range(1, 6):
        (tmp_path / f"data_batch_{n}.bin").write_bytes(bytes([n]) + bytes(3072))
    (tmp_path / "test_batch.bin").write_bytes(bytes([9]) + bytes(3072))
    assert import_set("cifar10", tmp_path, tmp_path / "out") == {"train": 5, "test": 1}
    assert [r["class_name"] for r in rows(tmp_path / "out", "train", "class_name")][:2] == ["automobile", "bird"]
    assert [r["label"] for r in rows(tmp_path / "out", "test", "label")] == [9]
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"holds no data_batch_3\.bin"):
        import_set("cifar10", tmp_path, tmp_path / "again")


def test_cifar100_from_the_hub_keeps_the_files(tmp_path, picture):
    for split, count in (("train", 3), ("test", 1)):
        table = {
            "img": [{"bytes": picture(n, 32), "path": None} for n in range(count)],
            "fine_label": [FINE.index("wolf")] * count,
            "coarse_label": [0] * count,
        }
        (tmp_path / "cifar100").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), tmp_path / "cifar100" / f"{split}-00000-of-00001.parquet")
    assert import_set("cifar100", tmp_path, tmp_path / "out") == {"train": 3, "test": 1}
    read = rows(tmp_path / "out", "train", "class_name", "superclass")
    assert {(r["class_name"], r["superclass"]) for r in read} == {("wolf", "large_carnivores")}
    assert [r["image"] for r in read] == [picture(n, 32) for n in range(3)]


def test_a_pickle_is_not_opened(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    (tmp_path / "in").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "in" / name).write_bytes(pickle.dumps(Touch()))
    with pytest.raises(DataError, match=r"a pickle.*binary version \(cifar-100-binary\.tar\.gz\)"):
        import_set("cifar100", tmp_path / "in", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def cut(folder):
    file = folder / "cifar-100-binary" / "test.bin"
    file.write_bytes(file.read_bytes()[:-1])


def empty(folder):
    (folder / "cifar-100-binary" / "test.bin").write_bytes(b"")


def missing(folder):
    (folder / "cifar-100-binary" / "train.bin").unlink()


def other_class(folder):
    (folder / "cifar-100-binary" / "test.bin").write_bytes(bytes([0, 100]) + bytes(3072))


def other_group(folder):
    (folder / "cifar-100-binary" / "test.bin").write_bytes(bytes([255, 99]) + bytes(3072))


def two_copies(folder):
    shutil.copytree(folder / "cifar-100-binary", folder / "copy")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"test\.bin has 6147 bytes, no multiple of the 3074"),
        (empty, r"test\.bin has 0 bytes"),
        (missing, r"holds no train\.bin"),
        (other_class, r"test\.bin/00000: the label 100 is none of the set's 100"),
        (other_group, r"test\.bin/00000: its superclass"),
        (two_copies, r"holds train\.bin 2 times"),
    ],
)
def test_damaged_cifar_leaves_nothing(cifar, tmp_path, damage, said):
    damage(cifar)
    with pytest.raises(DataError, match=said):
        import_set("cifar100", cifar, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.fixture
def oxford(tmp_path):
    """Twelve corn poppies in the three official parts, and two other flowers to test on."""
    labels = [26] * 12 + [1, 102]
    for n in range(1, 15):
        put(tmp_path / "in" / "jpg" / f"image_{n:05d}.jpg", noise(n, 30, 40, 3))
    savemat(tmp_path / "in" / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    parts = {"trnid": [range(1, 5)], "valid": [range(5, 9)], "tstid": [range(9, 15)]}
    savemat(tmp_path / "in" / "setid.mat", {key: np.array([list(*ids)], np.uint16) for key, ids in parts.items()})
    return tmp_path / "in"


def test_oxford102_as_the_module_reads_it(oxford, tmp_path):
    assert import_set("oxford102", oxford, tmp_path / "out") == {"train": 8, "test": 6}
    data = open_data(Oxford102Data(kind="oxford102", path=str(tmp_path / "out"), folds=6), 0)
    assert data.subject == "corn poppy flowers"
    normals, test = data.normals(), data.test()
    assert (len(normals.train), len(normals.validation)) == (8, 2)
    assert test.classes[2:] == ("pink primrose", "blackberry lily")
    assert test.anomalous.tolist() == [False, False, True, True]
    read = rows(tmp_path / "out", "train", "orig_split")
    assert [r["orig_split"] for r in read] == ["train"] * 4 + ["val"] * 4
    assert read[0]["image"] == (oxford / "jpg" / "image_00001.jpg").read_bytes()
    assert len(set(FLOWERS)) == 102


def test_pictures_are_scaled_down_and_never_up(oxford, tmp_path):
    put(oxford / "jpg" / "image_00002.jpg", noise(2, 10, 8, 3))
    import_set("oxford102", oxford, tmp_path / "out", size=15)
    large, small, *_ = rows(tmp_path / "out", "train")
    assert Image.open(io.BytesIO(large["image"])).format == "PNG"
    assert decode(large["image"], "large").shape == (15, 20, 3)
    assert small["image"] == (oxford / "jpg" / "image_00002.jpg").read_bytes()


def test_damaged_oxford102_leaves_nothing(oxford, tmp_path):
    file = oxford / "jpg" / "image_00003.jpg"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"image_00003\.jpg: the image is cut short"):
        import_set("oxford102", oxford, tmp_path / "out")
    file.unlink()
    with pytest.raises(DataError, match=r"lacks the picture image_00003\.jpg"):
        import_set("oxford102", oxford, tmp_path / "out")
    savemat(oxford / "setid.mat", {key: np.array([[1, 2]]) for key in ("trnid", "valid", "tstid")})
    with pytest.raises(DataError, match=r"setid\.mat does not name each picture"):
        import_set("oxford102", oxford, tmp_path / "out")
    (oxford / "setid.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"setid\.mat cannot be read as a MATLAB file"):
        import_set("oxford102", oxford, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


UCM_NUMBERS = [*range(1901, 1951), *range(1991, 2001), 1, 101]
"""Storage tanks, of which the last ten are tested on, a field and an airplane."""


def ucm(folder, name):
    """UCM-Captions, its pictures under the path that `name(number)` gives."""
    images = []
    for n in UCM_NUMBERS:
        put(folder / name(n), noise(n, 6, 6, 3))
        split = "test" if not 1901 <= n <= 1950 else "val" if n < 1911 else "train"
        sentences = [{"raw": f"Picture {n} has  sentence {i} ."} for i in range(5)]
        images.append({"filename": f"{n}.tif", "split": split, "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": "UCM"}))
    return folder


def of_uc_merced(number):
    name = UC_MERCED[(number - 1) // 100]
    return f"UCMerced_LandUse/Images/{name}/{name}{(number - 1) % 100:02d}.tif"


@pytest.mark.parametrize("name", [of_uc_merced, lambda number: f"imgs/{number}.tif"])
def test_ucm_captions_as_the_module_reads_it(tmp_path, name):
    source = ucm(tmp_path / "in", name)
    assert import_set("ucm_captions", source, tmp_path / "out") == {"train": 50, "test": 12}
    data = open_data(UcmData(kind="ucm_captions", path=str(tmp_path / "out"), labels=(19,)), 0)
    normals, test = data.normals(), data.test()
    assert set(normals.train.classes) == {"storagetanks"}
    assert test.classes == ("storagetanks",) * 10 + ("agricultural", "airplane")
    assert test.captions[-1] in {f"Picture 101 has sentence {i}." for i in range(5)}
    np.testing.assert_array_equal(test.images[-1], noise(101, 6, 6, 3))
    read = rows(tmp_path / "out", "test", "caption_id", "label")[-1]
    assert (read["caption_id"], read["label"], read["source"]) == (101, 1, "airplane/airplane00.tif")
    assert Image.open(io.BytesIO(read["image"])).format == "PNG"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": [{"filename": "1.tif"}]}', '{"images": [{"filename": "x.tif", "split": "test"}]}']
)
def test_another_json_is_an_error_with_its_name(tmp_path, text):
    source = ucm(tmp_path / "in", of_uc_merced)
    (source / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.json is not as UCM-Captions'"):
        import_set("ucm_captions", source, tmp_path / "out")


def tile(folder, kind, number, exposure, mask=None):
    file = folder / f"MT_{kind}" / "Imgs" / f"exp{exposure}_num_{number}.jpg"
    put(file, noise(number, 20, 30))
    if mask is not None:
        put(file.with_suffix(".png"), mask)
    return file


@pytest.fixture
def any_number(monkeypatch):
    """Sets of fewer pictures than there are."""
    monkeypatch.setattr(published, "TILES", dict.fromkeys(published.TILES, 0))


@pytest.fixture
def tiles(any_number, tmp_path):
    """Twelve tiles of three exposures, numbered from 1000 on; the last one has a crack that two exposures show."""
    half = np.zeros((20, 30), np.uint8)
    half[:, :15] = 255
    for n in range(33):
        tile(tmp_path / "in", "Free", 1000 * (n // 3 + 1) + 20 * (n % 3), n % 3 + 1, half * 0)
    tile(tmp_path / "in", "Crack", 12_000, 1, half)
    tile(tmp_path / "in", "Crack", 12_020, 2, half * 0)
    tile(tmp_path / "in", "Free", 12_040, 3)
    return tmp_path / "in"


def test_magnetic_tile_as_the_module_reads_it(tiles, tmp_path):
    assert import_set("magnetic_tile", tiles, tmp_path / "out") == {"all": 36}
    data = open_data(MagneticTileData(kind="magnetic_tile", path=str(tmp_path / "out")), 0)
    normals, test = data.normals(), data.test()
    assert (len(normals.train), len(normals.validation), len(test)) == (6 * 3, 2 * 3, 4 * 3)
    assert sorted(test.classes).count("crack") == 2
    read = rows(tmp_path / "out", "all", "group", "mask", "label", "superclass")
    assert len({r["group"] for r in read}) == 12
    cracks = [r for r in read if r["label"] == 3]
    assert {(r["group"], r["superclass"]) for r in cracks} == {("tile011", "defect")}
    mask = Image.open(io.BytesIO(cracks[0]["mask"]))
    assert (mask.mode, mask.size, np.asarray(mask).mean()) == ("1", (30, 20), 0.5)
    assert [r for r in read if r["mask"] is not None] == cracks[:1]


def test_masks_are_scaled_with_their_pictures(tiles, tmp_path):
    import_set("magnetic_tile", tiles, tmp_path / "out", size=10)
    for row in rows(tmp_path / "out", "all", "mask"):
        for content in filter(None, (row["image"], row["mask"])):
            assert decode(content, "row").shape == (10, 15, 3)


def test_a_mask_that_is_black_once_it_is_scaled_is_none(tiles, tmp_path):
    speck = np.zeros((20, 30), np.uint8)
    speck[0, 0] = 255
    tile(tiles, "Crack", 12_000, 1, speck)
    for size, masks in ((None, 1), (10, 0)):
        import_set("magnetic_tile", tiles, tmp_path / f"out{size}", size=size)
        assert sum(r["mask"] is not None for r in rows(tmp_path / f"out{size}", "all", "mask")) == masks


def test_damaged_tiles_leave_nothing(tiles, tmp_path):
    put(tiles / "MT_Crack" / "Imgs" / "exp1_num_12000.png", noise(1, 20, 29))
    with pytest.raises(DataError, match=r"exp1_num_12000\.png has the size \(29, 20\)"):
        import_set("magnetic_tile", tiles, tmp_path / "out")
    put(tiles / "MT_Dent" / "Imgs" / "exp1_num_12100.jpg", noise(1, 20, 30))
    with pytest.raises(DataError, match=r"MT_Dent/Imgs/exp1_num_12100\.jpg is not named"):
        import_set("magnetic_tile", tiles, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_tiles_are_imported_whole_or_not_at_all(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "TILES", {**published.TILES, "free": 34, "crack": 3, "fray": 2})
    with pytest.raises(DataError, match="lacks pictures of the set: 1 of 3 in MT_Crack, 2 of 2 in MT_Fray; unpack"):
        import_set("magnetic_tile", tiles, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    monkeypatch.setattr(published, "TILES", {**published.TILES, "crack": 2, "fray": 0})
    assert import_set("magnetic_tile", tiles, tmp_path / "out") == {"all": 36}


def test_tiles_are_told_apart_by_exposure_and_number(any_number, tmp_path):
    numbers = [(100, 1), (230, 2), (381, 3), (400, 3), (410, 2), (415, 4)]
    for number, exposure in numbers:
        tile(tmp_path, "Free", number, exposure)
    groups = {int(e.source.split("_")[-1][:-4]): e.extra["group"] for e in magnetic_tile(tmp_path)}
    assert groups == dict(
        zip([n for n, _ in numbers], ["tile000", "tile000", "tile001", "tile002", "tile003", "tile003"], strict=True)
    )


def test_more_rows_than_a_file_takes(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_ROWS_OF_FILE", 6)
    monkeypatch.setattr(importing, "_ROWS_AT_ONCE", 4)
    assert import_set("cifar100", cifar, tmp_path / "out")["train"] == 14
    assert [p.name for p in shards(tmp_path / "out", "train")] == [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert [r["source"] for r in rows(tmp_path / "out", "train")] == [f"train.bin/{n:05d}" for n in range(14)]


def test_what_cannot_be_imported(cifar, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name, source, target, kind, said in (
        ("mnist", cifar, "out", ConfigError, "there is no set 'mnist' to import; there are cifar100"),
        ("cifar100", tmp_path / "none", "out", DataError, "none does not exist"),
        ("cifar100", tmp_path / "full" / "file", "out", DataError, "is a file; unpack it"),
        ("cifar100", cifar, "full", DataError, "is there already"),
        ("cifar100", cifar, "full/file/out", ResourceError, "cannot write"),
        ("magnetic_tile", cifar, "out", DataError, "holds no picture of magnetic_tile;"),
    ):
        with pytest.raises(kind, match=said):
            import_set(name, source, tmp_path / target)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "full"}


def test_a_link_to_an_empty_folder_is_filled(cifar, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    import_set("cifar100", cifar, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(shards(tmp_path / "there", "train")) == 1


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_import(cifar, tmp_path, monkeypatch):
    monkeypatch.setitem(importing.SETS, "cifar100", lambda _: pytest.fail("the set was read"))
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.is_mount", lambda self: self == tmp_path / "out")
        with pytest.raises(DataError, match="out is the current folder or a mount point"):
            import_set("cifar100", cifar, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(DataError, match="is the current folder or a mount point"):
        import_set("cifar100", cifar, Path())


def test_the_verb(cifar, tmp_path):
    done = CliRunner().invoke(cli.app, ["import", "cifar100", str(cifar), str(tmp_path / "out"), "--size", "16"])
    assert done.exit_code == 0
    assert decode(rows(tmp_path / "out", "test")[0]["image"], "row").shape == (16, 16, 3)


def test_real_cifar_pictures_come_back(real_data, tmp_path):
    read = rows(real_data / "cifar100", "test", "class_name")[:300]
    images = decode_rows(read, "cifar100")
    (tmp_path / "in").mkdir()
    for name in ("train.bin", "test.bin"):
        records = [record(row["class_name"], image) for row, image in zip(read, images, strict=True)]
        (tmp_path / "in" / name).write_bytes(b"".join(records))
    import_set("cifar100", tmp_path / "in", tmp_path / "out")
    again = rows(tmp_path / "out", "test", "class_name", "label")
    assert [r["class_name"] for r in again] == [r["class_name"] for r in read]
    for image, other in zip(images, decode_rows(again, "again"), strict=True):
        np.testing.assert_array_equal(image, other)


def test_tiles_of_the_real_set(real_data, tmp_path):
    """The names of its pictures alone give the groups."""
    read = read_rows(shards(real_data / "magnetic_tile", "all"), ["source", "group", "label"])
    for row in read:
        file = tmp_path / row["source"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = [(e.source, e.extra["group"], e.label) for e in magnetic_tile(tmp_path)]
    assert found == [(row["source"], row["group"], row["label"]) for row in read]

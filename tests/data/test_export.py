from pathlib import Path

import numpy as np
import pytest

from kka_ray.config.models import FolderData
from kka_ray.data import open_data
from kka_ray.data.decode import decode, encode_png
from kka_ray.data.export import export_folder
from kka_ray.errors import DataError

MASK = encode_png(np.full((8, 8, 3), 255, np.uint8))


def rows_for(picture):
    """16 groups of two normal pictures; two groups with a normal, a crack and a (maskless) dent."""
    rows = []

    def add(name, group, mask=None):
        rows.append(
            {
                "image": picture(len(rows)),
                "label": 0,
                "class_name": name,
                "superclass": "normal" if name == "free" else "defect",
                "source": f"../../{name}/{group}_{len(rows)}.jpg",
                "mask": mask,
                "group": group,
            }
        )

    for n in range(32):
        add("free", f"t{n // 2}")
    for group in ("m0", "m1"):
        add("free", group)
        add("crack", group, MASK)
        add("dent", group)
    return rows


@pytest.fixture
def source(tmp_path, picture, write_rows):
    return write_rows(tmp_path / "in" / "all-00000-of-00001.parquet", rows_for(picture))


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def groups(folder: Path) -> set[str]:
    return {p.stem.split("_")[1] for p in folder.iterdir()}


def test_layout_and_counts(source, tmp_path):
    done = export_folder(source, tmp_path / "out")
    assert (done.train_good, done.test_good, done.masks, done.duplicates) == (24, 8 + 2, 2, 0)
    assert done.defects == {"crack": 2, "dent": 2}
    top = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").glob("*/*")}
    assert top == {"train/good", "test/good", "test/crack", "test/dent", "ground_truth/crack"}
    cracks = {p.stem for p in (tmp_path / "out/test/crack").iterdir()}
    assert {p.name for p in (tmp_path / "out/ground_truth/crack").iterdir()} == {f"{c}_mask.png" for c in cracks}


def test_groups_stay_together_and_mixed_ones_are_tested(source, tmp_path):
    export_folder(source, tmp_path / "out")
    train, test = groups(tmp_path / "out/train/good"), groups(tmp_path / "out/test/good")
    assert not train & test
    assert len(train) == 12
    assert {"m0", "m1"} <= test


def test_files_keep_their_bytes_and_stay_inside(source, tmp_path, picture):
    export_folder(source, tmp_path / "out")
    for file in (tmp_path / "out/train/good").iterdir():
        assert file.suffix == ".png"
        assert file.read_bytes() == picture(int(file.stem.split("_")[0]))
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_repeats_by_seed(source, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        export_folder(source.parent, tmp_path / name, seed=seed)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    assert names(tmp_path / "a") != names(tmp_path / "c")


def test_the_folder_can_be_read_back(source, tmp_path):
    export_folder(source, tmp_path / "out")
    data = open_data(FolderData(kind="folder", path=str(tmp_path / "out"), description="a tile"), 0)
    normals, test = data.normals(), data.test()
    assert len(normals.train) + len(normals.validation) == 24
    assert set(test.classes) == {"good", "crack", "dent"}
    assert data.test_dropped == {"unreadable": 0, "too_large": 0, "duplicate": 0}


def test_copies_across_the_parts_stay_in_training(tmp_path, picture, write_rows):
    rows = rows_for(picture)
    for row in rows[-6:]:
        row["image"], row["mask"] = picture(0), None
    source = write_rows(tmp_path / "a.parquet", rows)
    kept = [export_folder(source, tmp_path / f"out{seed}", seed=seed) for seed in range(3)]
    assert {d.duplicates for d in kept} <= {5, 6}
    everything = [decode(p.read_bytes(), p.name).tobytes() for p in (tmp_path / "out0").rglob("*.png")]
    assert len(everything) == len(set(everything))


def test_target_must_be_empty(source, tmp_path):
    (tmp_path / "out").mkdir()
    export_folder(source, tmp_path / "out")
    with pytest.raises(DataError, match="out is there already and is not an empty folder"):
        export_folder(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": b"x"}, "crack/m1_36"),
        ({"mask": b"x"}, "the mask of .*crack/m1_36"),
        ({"mask": encode_png(np.zeros((3, 8, 3), np.uint8))}, r"mask of .* has the size \(3, 8\), its image \(8, 8\)"),
        ({"class_name": "../evil"}, "class name '../evil' cannot name a folder"),
        ({"class_name": "good"}, "class name 'good' cannot name a folder"),
    ],
)
def test_bad_rows_leave_nothing_behind(tmp_path, picture, write_rows, change, message):
    rows = rows_for(picture)
    rows[36] |= change
    source = write_rows(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=message):
        export_folder(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_too_few_normal_groups(tmp_path, picture, write_rows):
    source = write_rows(tmp_path / "a.parquet", rows_for(picture)[30:])
    with pytest.raises(DataError, match=r"has 1 group.*at least 2 are needed"):
        export_folder(source, tmp_path / "out")


def test_missing_source(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none\.parquet"):
        export_folder(tmp_path / "none.parquet", tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no \*\.parquet"):
        export_folder(tmp_path, tmp_path / "out")


def test_real_magnetic_tiles(real_data, tmp_path):
    done = export_folder(real_data / "magnetic_tile", tmp_path / "out")
    assert done.train_good + done.test_good == 952
    assert done.defects == {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert done.masks == 386

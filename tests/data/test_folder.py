import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kka_ray.config.models import FolderData
from kka_ray.data import open_data
from kka_ray.data.base import content_hash
from kka_ray.data.folder import image_files
from kka_ray.errors import DataError


def config(folder, **changes):
    return FolderData(**{"kind": "folder", "path": str(folder), "description": "a steel screw", **changes})


def hashes(images):
    return {content_hash(image) for image in images.images}


def huge_header() -> bytes:
    """A PNG that promises 9,000 x 9,000 pixels and holds none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def mvtec(tmp_path, write_images):
    write_images(tmp_path / "train" / "good", 20)
    write_images(tmp_path / "test" / "good", 4, 100)
    write_images(tmp_path / "test" / "bent_tip", 3, 200)
    write_images(tmp_path / "test" / "scratch", 2, 300)
    return tmp_path


@pytest.mark.parametrize("place", ["", "good", "train/good"])
def test_layouts(tmp_path, write_images, place):
    write_images(tmp_path / place, 20)
    data = open_data(config(tmp_path), 0)
    normals = data.normals()
    assert (len(normals.train), len(normals.validation)) == (16, 4)
    assert normals.dropped == {"unreadable": 0, "too_large": 0, "duplicate": 0}
    assert data.subject == "a steel screw"
    assert data.normal_terms == ("steel screw",)
    assert data.test() is None


def test_flat_layout_does_not_take_sub_folders_for_normals(tmp_path, write_images):
    write_images(tmp_path, 12)
    write_images(tmp_path / "other", 5, 50)
    normals = open_data(config(tmp_path), 0).normals()
    assert len(normals.train) + len(normals.validation) == 12


def test_normals_that_lie_in_other_sub_folders_alone_are_named(tmp_path, write_images):
    write_images(tmp_path / "batch1", 12)
    with pytest.raises(
        DataError, match=r"itself, only in sub-folders \(as batch1/000\.png\).*read with their sub-folders"
    ):
        open_data(config(tmp_path), 0).normals()


def test_sub_folders_of_good_in_the_order_of_paths(tmp_path, write_images):
    write_images(tmp_path / "good" / "b", 6)
    write_images(tmp_path / "good" / "a", 6, 50)
    train = open_data(config(tmp_path), 0).normals().train
    assert list(train.ids) == sorted(train.ids)
    assert {id_.rsplit("/", 1)[0] for id_ in train.ids} == {"good/a", "good/b"}


def test_hidden_and_other_files_are_no_images(tmp_path, write_images):
    write_images(tmp_path, 12)
    for name in (".DS_Store", "._000.png", "notes.md", "license.txt"):
        (tmp_path / name).write_bytes(b"x")
    data = open_data(config(tmp_path), 0)
    assert data.normals().dropped["unreadable"] == 0
    assert data.skipped == []


def test_images_of_formats_that_are_not_read_are_listed(tmp_path, write_images, picture):
    write_images(tmp_path, 12)
    (tmp_path / "phone.HEIC").write_bytes(b"\x00\x00\x00\x18ftypheic")
    (tmp_path / "windows.jfif").write_bytes(picture(20))
    data = open_data(config(tmp_path), 0)
    assert data.normals().dropped["unreadable"] == 1
    ((name, reason),) = data.skipped
    assert name == "phone.HEIC"
    assert "use one of PNG, JPEG" in reason
    assert "windows.jfif" in {*data.normals().train.ids, *data.normals().validation.ids}


def test_split_of_the_mvtec_layout(mvtec):
    data = open_data(config(mvtec), 0)
    normals, test = data.normals(), data.test()
    assert test.classes == ("good",) * 4 + ("bent_tip",) * 3 + ("scratch",) * 2
    assert test.anomalous.tolist() == [False] * 4 + [True] * 5
    assert test.ids[4] == "test/bent_tip/200.png"
    assert "bent tip" in test.captions[4]
    assert not hashes(normals.train) & hashes(normals.validation)


def test_repeats_by_seed(mvtec):
    first, again, other = (open_data(config(mvtec), seed).normals() for seed in (0, 0, 1))
    assert first.train.identity() == again.train.identity()
    assert first.validation.ids != other.validation.ids


def test_copies_are_dropped_within_the_normals_and_from_the_test(mvtec, picture):
    (mvtec / "train" / "good" / "copy.png").write_bytes(picture(0))
    (mvtec / "test" / "scratch" / "leak.png").write_bytes(picture(1))
    data = open_data(config(mvtec), 0)
    assert data.normals().dropped["duplicate"] == 1
    assert "test/scratch/leak.png" not in data.test().ids
    assert data.test_dropped["duplicate"] == 1


def test_bad_files_are_skipped_counted_and_listed(mvtec, picture):
    good = mvtec / "train" / "good"
    (good / "cut.png").write_bytes(picture(0, 32)[:300])
    (good / "empty.jpg").write_bytes(b"")
    (good / "huge.png").write_bytes(huge_header())
    (good / "nowhere.png").symlink_to("gone.png")
    (good / "words.JPEG").write_bytes(b"not an image")
    (mvtec / "test" / "scratch" / "bad.png").write_bytes(b"no")
    data = open_data(config(mvtec), 0)
    assert data.normals().dropped == {"unreadable": 4, "too_large": 1, "duplicate": 0}
    names = ["cut.png", "empty.jpg", "huge.png", "nowhere.png", "words.JPEG"]
    assert [name for name, _ in data.skipped] == [f"train/good/{n}" for n in names]
    assert "9000 x 9000" in dict(data.skipped)["train/good/huge.png"]
    data.test()
    data.test()
    assert len(data.skipped) == 6
    assert data.test_dropped == {"unreadable": 1, "too_large": 0, "duplicate": 0}


def test_max_pixels_is_obeyed_by_pixels_and_by_bytes(tmp_path, write_images, picture):
    write_images(tmp_path, 12)
    (tmp_path / "large.png").write_bytes(picture(50, 9))
    (tmp_path / "long.png").write_bytes(bytes(2_000_000))
    data = open_data(config(tmp_path, max_pixels=64), 0)
    assert data.normals().dropped["too_large"] == 2
    assert "2000000 bytes" in dict(data.skipped)["long.png"]


def test_no_test_file_is_opened_before_test(mvtec):
    for file in (mvtec / "test").rglob("*.png"):
        file.write_bytes(b"garbage")
    data = open_data(config(mvtec), 0)
    assert len(data.normals().train) == 16
    assert data.skipped == []
    with pytest.raises(DataError, match=r"no normal test image is left, after 9 that cannot be used.*100\.png"):
        data.test()


def test_without_defects_there_is_no_test(mvtec):
    for file in (mvtec / "test").rglob("*.png"):
        if file.parent.name != "good":
            file.unlink()
    assert open_data(config(mvtec), 0).test() is None


def test_defects_without_normal_test_images_are_refused_before_anything_is_read(mvtec):
    for file in (mvtec / "test" / "good").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"holds defects \(bent_tip, scratch\) but no normal images in good/"):
        open_data(config(mvtec), 0)


def test_path_that_is_no_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_data(config(tmp_path / "none"), 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; it must be a folder"):
        open_data(config(tmp_path / "file"), 0)


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"holds no image .*train/good"):
        open_data(config(tmp_path), 0).normals()


def test_no_readable_image(tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"of 12 images none can be used \(first: unreadable: 0\.png"):
        open_data(config(tmp_path), 0).normals()


def test_one_normal_image(tmp_path, write_images):
    write_images(tmp_path, 1)
    with pytest.raises(DataError, match="1 distinct normal.*at least 10 are needed"):
        open_data(config(tmp_path), 0).normals()


def test_copies_of_one_image_are_one_image(tmp_path, picture):
    for n in range(30):
        (tmp_path / f"{n}.png").write_bytes(picture(0))
    with pytest.raises(DataError, match="1 distinct normal.*Left out: 29 duplicate"):
        open_data(config(tmp_path), 0).normals()


# --- captions -----------------------------------------------------------------------------------------------------


def captions_of(data):
    normals = data.normals()
    parts = (normals.train, normals.validation)
    return {i: c for part in parts for i, c in zip(part.ids, part.captions, strict=True)}


def write_csv(folder, lines, header="file,caption"):
    (folder / "captions.csv").write_text("\n".join([header, *lines]) + "\n")


def test_templates_from_the_description(tmp_path, write_images):
    write_images(tmp_path, 20)
    texts = set(captions_of(open_data(config(tmp_path), 0)).values())
    assert len(texts) >= 3
    assert all("a steel screw" in t and "a a " not in t for t in texts)


def test_sidecar_files(tmp_path, write_images):
    write_images(tmp_path, 12)
    (tmp_path / "003.txt").write_text("\n  a  shiny screw \nmore\n")
    (tmp_path / "004.txt").write_text("\n")
    texts = captions_of(open_data(config(tmp_path), 0))
    assert texts["003.png"] == "a shiny screw"
    assert "a steel screw" in texts["004.png"]


def test_sidecar_that_is_not_text(tmp_path, write_images):
    write_images(tmp_path, 12)
    (tmp_path / "003.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"003\.txt cannot be read as a caption"):
        open_data(config(tmp_path), 0).normals()


def test_csv_with_names_from_either_folder(mvtec):
    lines = [f"{'train/good/' if n % 2 else ''}{n:03d}.png,screw number {n}" for n in range(20)]
    write_csv(mvtec, [*lines, 'test/scratch/300.png,"a screw, scratched"'])
    data = open_data(config(mvtec, captions="captions.csv"), 0)
    texts = captions_of(data)
    assert all(text == f"screw number {int(name[-7:-4])}" for name, text in texts.items())
    test = data.test()
    assert dict(zip(test.ids, test.captions, strict=True))["test/scratch/300.png"] == "a screw, scratched"


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (["000.png,a"], "file,caption", r"no caption for 11 of the normal images, the first of them 001\.png"),
        (["000.png,a", "999.png,b"], "file,caption", r"line 3: there is no file 999\.png"),
        (["000.png,a", f"{'9' * 300}.png,b"], "file,caption", r"line 3: there is no file 9+\.png"),
        (["000.png,a", "000.png,b"], "file,caption", r"line 3: 000\.png has a caption already"),
        (["000.png,"], "file,caption", "line 2: the file or its caption is empty"),
        (["000.png,a"], "name,text", "columns file and caption once each, separated by commas; it has 'name', 'text'"),
        (["000.png;a"], "file;caption", "separated by commas; it has 'file;caption'"),
        (["000.png,a,b"], "file,caption,caption", "once each.*it has 'caption', 'caption', 'file'"),
        (
            ['000.png,"a', "001.png,b"],
            "file,caption",
            "below line 1: unexpected end of data; look there for a double quote",
        ),
        (["000.png,a screw, from the side"], "file,caption", "line 2: it has more cells than there are columns; put a"),
    ],
)
def test_captions_that_do_not_fit(tmp_path, write_images, lines, header, message):
    write_images(tmp_path, 12)
    write_csv(tmp_path, lines, header)
    with pytest.raises(DataError, match=message):
        open_data(config(tmp_path, captions="captions.csv"), 0).normals()


def test_missing_csv(tmp_path, write_images):
    write_images(tmp_path, 12)
    with pytest.raises(DataError, match=r"data\.captions: .*captions\.csv cannot be read"):
        open_data(config(tmp_path, captions="captions.csv"), 0).normals()


def test_linked_folders_are_read_once(tmp_path, write_images):
    write_images(tmp_path / "elsewhere", 12)
    good = tmp_path / "data" / "train" / "good"
    good.mkdir(parents=True)
    (good / "batch1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(good)
    assert len(image_files(good, recursive=True)) == 12
    found = open_data(config(tmp_path / "data"), 0).normals()
    assert len(found.train) + len(found.validation) == 12


def test_images_that_would_fill_the_memory_are_refused(tmp_path, write_images, monkeypatch):
    write_images(tmp_path, 12)
    monkeypatch.setattr("kka_ray.data.folder.usable_memory", lambda: 1_000)
    with pytest.raises(DataError, match=r"of 12, alone take .* GB, more than 50% of the memory.*image_size"):
        open_data(config(tmp_path), 0).normals()


def test_test_images_count_together_with_the_normals(tmp_path, write_images, monkeypatch):
    write_images(tmp_path / "train" / "good", 12)
    write_images(tmp_path / "test" / "good", 2, first=100)
    write_images(tmp_path / "test" / "scratch", 2, first=200)
    roomy = open_data(config(tmp_path), 0)
    assert roomy.test() is not None
    each = roomy.normals().train.images[0].nbytes
    monkeypatch.setattr("kka_ray.data.folder.usable_memory", lambda: 2 * 15 * each)
    data = open_data(config(tmp_path), 0)
    data.normals()
    with pytest.raises(DataError, match=r"up to test/scratch/201\.png, 4 of 4"):
        data.test()


def test_images_of_one_object_stay_together(tmp_path, write_images, picture):
    for part in range(6):
        for shot in range(3):
            (tmp_path / f"{shot}_part{part}_front.png").write_bytes(picture(10 * part + shot))
    (tmp_path / "other.png").write_bytes(picture(99))
    seen = set()
    for seed in range(6):
        normals = open_data(config(tmp_path, group=r"_(part\d)_", validation=0.3), seed).normals()
        assert len(normals.train) + len(normals.validation) == 19
        parts = [
            {name.split("_")[1] if "_" in name else name for name in s.ids} for s in (normals.train, normals.validation)
        ]
        assert not parts[0] & parts[1]
        assert len(parts[1]) == 2  # of 7, by its own the file that does not match
        seen |= parts[1]
    assert len(seen) > 3


def test_of_objects_with_few_images_as_many_validate_as_it_takes(tmp_path, write_images):
    write_images(tmp_path, 12)
    for number in range(12):
        # The first two show objects of their own.
        (tmp_path / f"{number:03d}.png").rename(tmp_path / f"part{max(number, 1)}_{number:03d}.png")
    for seed in range(4):
        normals = open_data(config(tmp_path, group=r"part(\d+)_", validation=0.01), seed).normals()
        assert len(normals.validation) == 2
    with pytest.raises(DataError, match=r"data\.group: 'p\(art\)' finds 'art' in all 12 names"):
        open_data(config(tmp_path, group="p(art)"), 0).normals()


def test_an_image_that_is_not_read_needs_no_caption(tmp_path, write_images):
    write_images(tmp_path, 12)
    (tmp_path / "x.heic").touch()
    write_csv(tmp_path, [f"{number:03d}.png,a screw" for number in range(12)], "file,caption")
    data = open_data(config(tmp_path, captions="captions.csv"), 0)
    data.look()
    assert data.normals().dropped["unreadable"] == 1
    for file in tmp_path.glob("*.png"):
        file.unlink()
    foreign = open_data(config(tmp_path, group=r"(\d+)"), 0)
    foreign.look()
    with pytest.raises(DataError, match="of 1 image none can be used"):
        foreign.normals()


@pytest.mark.parametrize(("bits", "warned"), [(12, True), (16, False)])
def test_images_that_use_a_small_part_of_the_range_are_warned_of(tmp_path, caplog, bits, warned):
    for number in range(12):
        grey = np.random.default_rng(number).integers(0, 2**bits, (20, 20)).astype(np.uint16)
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
    open_data(config(tmp_path), 0).normals()
    assert ("12 bits in files of 16" in caplog.text) == warned


def test_names_that_are_no_utf_8_are_escaped(mvtec):
    good, latin = os.fsencode(mvtec / "train" / "good"), b"caf\xe9"
    os.rename(sorted(os.scandir(good), key=lambda entry: entry.name)[0], good + b"/" + latin + b".png")
    with open(good + b"/" + latin + b"2.png", "wb") as stream:
        stream.write(b"no image")
    os.rename(mvtec / "test" / "scratch", os.fsencode(mvtec / "test") + b"/" + latin)
    data = open_data(config(mvtec), 0)
    normals, test = data.normals(), data.test()
    assert "train/good/caf\\xe9.png" in normals.train.ids + normals.validation.ids
    assert [name for name, _ in data.skipped] == ["train/good/caf\\xe92.png"]
    assert "caf\\xe9" in test.classes
    # What goes into records, keys and prompts is text.
    for part in (normals.train, normals.validation, test):
        "".join((*part.ids, *part.classes, *part.captions)).encode()
        part.identity()


@pytest.mark.parametrize("group", [r"part(\d)_", r"0(x)?\d"])
def test_a_group_that_no_name_holds_is_refused(tmp_path, write_images, group):
    write_images(tmp_path, 12)
    with pytest.raises(DataError, match=r"data\.group: .* is found in no name of a normal image, as in '000\.png'"):
        open_data(config(tmp_path, group=group), 0).normals()


def test_images_whose_names_match_without_a_group_are_by_themselves(tmp_path):
    data = open_data(config(tmp_path, group=r"x(\d)?_"), 0)
    assert data._groups(["x1_a.png", "x_a.png", "x1_b.png", "x_b.png", "y.png"]) == [
        *("1", "/x_a.png", "1", "/x_b.png", "/y.png")
    ]


@pytest.mark.parametrize(("group", "said"), [("part(", "no regular expression"), ("part", "one pair of brackets")])
def test_a_group_must_be_named(tmp_path, group, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, group=group)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, write_images, monkeypatch):
    write_images(tmp_path / "train" / "good" / "batch", 12)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(DataError, match=r"good cannot be listed \(.*Permission denied"):
        image_files(tmp_path / "train" / "good", recursive=True)

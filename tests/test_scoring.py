import csv
import io
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kka_ray import assets, scoring
from kka_ray.config.models import BackboneConfig, Knn, SimpleNet
from kka_ray.data.decode import encode_png
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import AssetError, DataError
from kka_ray.scoring import overlay, score_folder

BACKBONE = "builtin:efficientnet-lite0"


@pytest.fixture(scope="module")
def normals() -> list[np.ndarray]:
    from kka_ray.data import flowers

    return [d.image for d in flowers.make_normals(30, 0)]


def _fit(config, normals) -> TunedDetector:
    from kka_ray.features.backbone import Backbone

    if not assets.is_present(BACKBONE):
        pytest.skip(f"{BACKBONE} is not in the cache: run `kka setup`")
    backbone = Backbone.load(BackboneConfig(image_size=64))
    train, validation = (backbone.extract(part, patches=True) for part in (normals[:20], normals[20:]))
    return TunedDetector.fit(config, backbone, train, None, validation, seed=0, false_positive_rate=0.1)


@pytest.fixture(scope="module")
def tuned(normals) -> TunedDetector:
    return _fit(Knn(kind="knn"), normals)


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tuned.save(folder / "detector")
    return folder


@pytest.fixture
def images(normals, tmp_path):
    """Two normal images, noise, and three files that cannot be read."""
    folder = tmp_path / "images"
    (folder / "deep" / "er").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (folder / "b.png").write_bytes(encode_png(normals[20]))
    (folder / "deep" / "er" / "noise.png").write_bytes(encode_png(noise))
    Image.fromarray(normals[21]).save(folder / "deep" / "c.BMP")
    (folder / "cut.png").write_bytes(encode_png(normals[22])[:-200])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.gif").touch()
    (folder / ".hidden.png").write_bytes(encode_png(noise))
    (folder / "notes.txt").write_text("no image at all")
    return folder


def _score(images, model, output, heatmaps=False, **options):
    text = io.StringIO()
    result = score_folder(images, model, output, heatmaps=heatmaps, console=Console(file=text), **options)
    with (output / "scores.csv").open(newline="") as stream:
        return result, {row["file"]: row for row in csv.DictReader(stream)}, text.getvalue()


def test_a_link_that_leads_nowhere_is_a_row(normals, run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_png(normals[20]))
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    _, rows, _ = _score(folder, run, tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.png": "ok",
        "gone.png": "failed",
        "itself.png": "failed",
    }
    assert "No such file" in rows["gone.png"]["error"]


def test_every_image_is_a_row_and_corrupt_ones_say_why(images, run, tmp_path):
    result, rows, _ = _score(images, run, tmp_path / "out")
    assert list(rows) == ["b.png", "cut.png", "deep/c.BMP", "deep/er/noise.png", "empty.gif", "text.jpg"]
    failed = {name: row["error"] for name, row in rows.items() if row["status"] == "failed"}
    assert set(failed) == {"cut.png", "empty.gif", "text.jpg"}
    assert "cut short or damaged" in failed["cut.png"]
    assert "empty" in failed["empty.gif"]
    assert "not an image" in failed["text.jpg"]
    assert all(rows[name]["score"] == rows[name]["verdict"] == "" for name in failed)
    assert (result.scored, result.failed) == (3, 3)
    assert result.error == failed["cut.png"], "the first one's"
    assert result.anomalous == sum(row["verdict"] == "anomalous" for row in rows.values())
    assert rows["deep/er/noise.png"]["verdict"] == "anomalous"


def test_scores_are_those_of_the_runs_own_detector(images, run, tuned, normals, tmp_path):
    _, rows, _ = _score(images, run, tmp_path / "out")
    own = tuned.score_images([normals[20], normals[21]])
    for i, name in enumerate(("b.png", "deep/c.BMP")):
        row = rows[name]
        assert float(row["score"]) == pytest.approx(float(own.score[i]), abs=1e-5)
        assert float(row["robust_z"]) == pytest.approx(float(own.robust_z[i]), abs=1e-2)
        assert float(row["percentile"]) == pytest.approx(float(own.percentile[i]), abs=0.1)
        assert row["verdict"] == ("anomalous" if own.anomalous[i] else "normal")


@pytest.mark.parametrize("limit", ["BATCH_PIXELS", "BATCH_IMAGES"])
def test_batches_of_any_size_give_the_same_scores(images, run, tmp_path, monkeypatch, limit):
    _, together, _ = _score(images, run / "detector", tmp_path / "a")
    sizes, judge = [], scoring.judge
    monkeypatch.setattr(
        scoring, "judge", lambda tuned, batch, heat: (sizes.append(len(batch)), judge(tuned, batch, heat))[1]
    )
    monkeypatch.setattr(scoring, limit, 1)
    _, alone, _ = _score(images, run, tmp_path / "b")
    assert set(sizes) == {1}
    assert list(alone) == list(together)
    for name, row in together.items():
        if row["status"] == "ok":
            assert float(alone[name]["score"]) == pytest.approx(float(row["score"]), abs=1e-5)


def test_heatmaps_lie_beside_the_table_and_have_the_images_size(images, normals, tmp_path):
    _fit(SimpleNet(epochs=1, width=16, hidden=32), normals).save(tmp_path / "detector")
    _score(images, tmp_path, tmp_path / "out", heatmaps=True)
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    maps = ["heatmaps/b.png.png", "heatmaps/deep/c.BMP.png", "heatmaps/deep/er/noise.png.png"]
    assert found == ["contact_sheet.png", *maps]
    with Image.open(tmp_path / "out" / maps[2]) as heat:
        assert heat.size == (60, 40)


def test_names_that_leave_no_room_for_a_suffix_are_shortened(normals, tmp_path):
    _fit(SimpleNet(epochs=1, width=16, hidden=32), normals).save(tmp_path / "detector")
    names = [f"{'x' * 246}{n}.jpeg" for n in range(2)] + [f"{'ü' * 125}.png", f"{'y' * 247}.png"]
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in names:
        (tmp_path / "images" / "deep" / name).write_bytes(encode_png(normals[20]))
    result, rows, _ = _score(tmp_path / "images", tmp_path, tmp_path / "out", heatmaps=True)
    assert (result.scored, set(rows)) == (4, {f"deep/{name}" for name in names})
    maps = {p.name for p in (tmp_path / "out" / "heatmaps" / "deep").iterdir()}
    assert len(maps) == 4
    assert f"{'y' * 247}.png.png" in maps
    assert sum(re.fullmatch(r"x+~[0-9a-f]{8}\.png", name) is not None for name in maps) == 2


def test_a_detector_that_does_not_localise_says_so(images, run, tmp_path):
    _, _, text = _score(images, run, tmp_path / "out", heatmaps=True)
    assert "does not localise" in text
    assert not (tmp_path / "out" / "heatmaps").exists()


def test_an_overlay_marks_the_hot_place_only():
    image = np.full((32, 32, 3), 100, np.uint8)
    heat = np.full((4, 4), -1.0, np.float32)
    heat[0, 0] = 20
    marked = overlay(image, heat)
    assert marked[0, 0].tolist() == [216, 25, 25]
    np.testing.assert_array_equal(marked[16:, 16:], image[16:, 16:])
    assert overlay(np.zeros((10, 4000, 3), np.uint8), heat).shape == (3, 1024, 3)


def test_the_contact_sheet_has_the_most_anomalous_first(images, run, tmp_path):
    _, rows, _ = _score(images, run, tmp_path / "out")
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        first = np.asarray(sheet)[12:140, 12:140]
    assert max(rows.values(), key=lambda r: float(r["score"] or 0))["file"] == "deep/er/noise.png"
    # 40 x 60 noise, enlarged: its colours vary everywhere but in the white bars above and below.
    assert first[40:80].std() > 40
    assert first[:15].min() == 255


def test_scoring_again_replaces_what_was_there_and_never_scores_its_own_output(images, run, tmp_path):
    output = images / "scores"
    _, before, _ = _score(images, run, output)
    (images / "b.png").unlink()
    _, after, _ = _score(images, run, output)
    assert set(before) - set(after) == {"b.png"}
    assert not [name for name in after if name.startswith("scores")]
    assert not [p for p in images.iterdir() if p.name.startswith(".scores")]


def test_a_single_image_can_be_scored(images, run, tmp_path):
    result, rows, _ = _score(images / "b.png", run, tmp_path / "out")
    assert result.scored == 1
    assert list(rows) == ["b.png"]


def test_the_limit_of_pixels_can_be_set(images, run, tmp_path):
    _, rows, _ = _score(images / "b.png", run, tmp_path / "out", max_pixels=100)
    assert "more than the limit of 100" in rows["b.png"]["error"]


def test_an_interrupted_scoring_leaves_nothing(images, run, tmp_path, monkeypatch):
    def fail(entries):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "_contact_sheet", fail)
    with pytest.raises(KeyboardInterrupt):
        _score(images, run, tmp_path / "out" / "scores")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("reached", range(6))
def test_a_scoring_that_is_interrupted_as_it_is_put_in_place_can_be_done_again(tmp_path, monkeypatch, reached):
    work, output = tmp_path / "out" / ".scoring-x", tmp_path / "out"
    for folder, content in ((output, "old"), (work, "new")):
        (folder / "heatmaps").mkdir(parents=True)
        for name in ("heatmaps/a.png", "contact_sheet.png", "scores.csv"):
            (folder / name).write_text(content)
    steps = iter(range(reached))

    def step(real):
        def done(*arguments, **options):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return done

    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, step(getattr(owner, name)))
    with suppress(KeyboardInterrupt):
        scoring._put_in_place(work, output)
    table, heat = output / "scores.csv", output / "heatmaps" / "a.png"
    assert table.is_file()
    assert not heat.exists() or heat.read_text() == table.read_text()


@pytest.mark.parametrize("name", ["heatmaps/mine.txt", "contact_sheet.png", "scores.csv"])
def test_files_of_something_else_are_not_replaced(images, run, tmp_path, name):
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(DataError, match="was not made by a scoring"):
        _score(images, run, tmp_path / "out")
    assert own.read_text() == "mine"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [own]


def test_no_images_and_no_model_are_errors(images, run, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        _score(tmp_path / "none", run, tmp_path / "out")
    with pytest.raises(DataError, match="there is no image or folder"):
        _score(tmp_path / "nowhere", run, tmp_path / "out")
    with pytest.raises(AssetError, match="holds no detector"):
        _score(images, tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(AssetError, match="kka resume"):
        _score(images, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_may_be_another_disk_and_the_folder_of_the_images(images, run, tmp_path):
    """What is made is put in place without leaving `output`, which may be a mount point."""
    made = []
    real = scoring.tempfile.TemporaryDirectory

    def noticed(**arguments):
        made.append(arguments["dir"])
        return real(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.tempfile, "TemporaryDirectory", noticed)
        _, elsewhere, _ = _score(images, run, tmp_path / "scores")
        assert made == [tmp_path / "scores"]
    for _ in range(2):  # the second time there is an output beside them
        _, here, _ = _score(images, run, images)
        assert set(here) == set(elsewhere)

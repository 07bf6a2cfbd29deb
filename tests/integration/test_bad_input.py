"""What a user can get wrong, through the command line: status 2 with a clear error, or rows that were skipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kka_ray.data import flowers
from kka_ray.data.decode import encode_png
from tests.integration.tiny_run import finish, models_are_missing, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`"),
]


def write(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    for i, flower in enumerate(flowers.make_normals(count, seed)):
        (folder / f"{i:03d}.png").write_bytes(encode_png(flower.image))


def on_folder(path: Path) -> list[str]:
    data = {"kind": "folder", "path": str(path), "description": "a garden flower"}
    return [f"data={json.dumps(data)}", "describe.guard.normal_vocabulary=false"]


def fails(work: Path, *overrides: str) -> str:
    process = start(work, *overrides)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert not (work / "runs" / "tiny" / "summary.json").exists()
    return output


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    assert "no image" in fails(tmp_path / "work", *on_folder(tmp_path / "images"))


def test_a_single_normal_image(tmp_path: Path) -> None:
    write(tmp_path / "images", 1, 0)
    output = fails(tmp_path / "work", *on_folder(tmp_path / "images"))
    assert "1" in output
    assert "normal" in output


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loop.round=1", "rounds"),
        ("describe.sampler.model=hub:nobody/nothing", "nobody/nothing"),
        ("render.pipeline=/no/such/folder", "/no/such/folder"),
        ("cluster.renderers.gpus=1", "GPU"),
    ],
)
def test_a_configuration_that_cannot_run(tmp_path: Path, override: str, said: str) -> None:
    assert said in fails(tmp_path, override)


def test_a_language_model_that_writes_nothing_usable(tmp_path: Path) -> None:
    """Every line is too short for the guard: nothing is drawn, each line is a row, and the run says so."""
    output = fails(tmp_path, "describe.guard.min_words=39", "describe.guard.max_words=40")
    assert "too_short" in output or "too short" in output


def test_damaged_images_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "images", 40, 0)
    whole = (tmp_path / "images" / "000.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "text.png").write_bytes(b"no picture")
    (tmp_path / "images" / "copy.png").write_bytes(whole)
    finish(start(tmp_path / "work", *on_folder(tmp_path / "images"), "loop.rounds=0"))
    summary = json.loads((tmp_path / "work" / "runs" / "tiny" / "summary.json").read_text())
    assert summary["normals"] == 40
    assert sum(summary["dropped"].values()) == 3
    assert summary["auc"] == {"baseline": None, "zeroth": None, "kka": None}, "there are no test images"
    review = pq.read_table(tmp_path / "work" / "runs" / "tiny" / "records" / "review.parquet").to_pandas()
    assert len(review)
    assert np.isfinite(review.score).all()


HOOK = """
import sys

def hook(event, arguments):
    if event == "open" and {part!r} in str(arguments[0]) and {mode!r} in str(arguments[1]):
        raise {error}

sys.addaudithook(hook)
"""


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path, part: str, mode: str, error: str) -> None:
    """In processes that are started from now on, opening a file whose path holds `part` in a mode such as r raises."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK.format(part=part, mode=mode, error=error))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_test_images_are_opened_by_the_final_evaluation_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of the run can open one: it must come as far as having every detector fitted, and then say so."""
    write(tmp_path / "images" / "train" / "good", 40, 0)
    write(tmp_path / "images" / "test" / "good", 4, 1)
    write(tmp_path / "images" / "test" / "broken", 4, 2)
    forbid(monkeypatch, tmp_path / "hook", "/images/test/", "r", "PermissionError('a test image is opened')")
    output = fails(tmp_path / "work", *on_folder(tmp_path / "images"), "loop.rounds=0")
    assert "no normal test image is left, after 8 that cannot be used" in " ".join(output.split())
    fits = list((tmp_path / "work" / "runs" / "store").glob("fit/*/committed.json"))
    # k-NN with normals alone; fused with the zero-th set, which is KKA's as well, with noise and with drawn normals.
    assert len(fits) == 4, output


@pytest.mark.parametrize("part", ["/store/fit/", "/tiny/.summary.json"])
def test_a_full_disk_ends_the_run_with_a_remedy_and_the_same_command_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    with monkeypatch.context() as full:
        forbid(full, tmp_path / "hook", part, "w", "OSError(28, 'No space left on device')")
        output = " ".join(fails(tmp_path / "work").split())
    assert "No space left on device" in output
    assert "Free some room" in output
    finish(start(tmp_path / "work"))

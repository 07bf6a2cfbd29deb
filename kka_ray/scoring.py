"""Scores for a folder of images: a table, heat maps laid over the images, and a contact sheet."""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kka_ray import places
from kka_ray.config.models import Engine
from kka_ray.data.decode import MAX_PIXELS, encode_png
from kka_ray.data.folder import SUFFIXES, image_files, read_image
from kka_ray.detectors.tuned import Scores, TunedDetector
from kka_ray.errors import AssetError, DataError, ResourceError

BATCH_IMAGES = 32
BATCH_PIXELS = 32_000_000
"""A batch ends at this many images or pixels: 100 MB of decoded images, unless a single one is larger."""

COLUMNS = ("file", "status", "score", "robust_z", "percentile", "verdict", "error")

_MADE = ("scores.csv", "heatmaps", "contact_sheet.png")
"""What a scoring puts into its folder, in this order."""

_HOT = 6.0
"""Heat, in MADs of validation normals, from which an overlay is at full strength, unless the image holds more."""
_OVERLAY_SIDE = 1024
_SHEET_IMAGES = 100
_THUMBNAIL = 128
_LONGEST_NAME = 255
"""Bytes of a file's name, on nearly every file system."""


@dataclass(frozen=True)
class ScoreResult:
    """How many images were scored, how many of those are anomalous, and how many files could not be read; of the first
    of these the error."""

    scored: int
    anomalous: int
    failed: int
    error: str


@dataclass(frozen=True)
class _Row:
    file: str
    error: str = ""
    score: float = 0.0
    robust_z: float = 0.0
    percentile: float = 0.0
    anomalous: bool = False

    def cells(self) -> tuple[str, ...]:
        if self.error:
            return (self.file, "failed", "", "", "", "", self.error)
        # Nine digits give a float32 back exactly.
        numbers = (f"{self.score:.9g}", f"{self.robust_z:.9g}", f"{self.percentile:.9g}")
        return (self.file, "ok", *numbers, verdict(self.anomalous), "")


def verdict(anomalous: bool) -> str:
    """`anomalous` or `normal`."""
    return "anomalous" if anomalous else "normal"


@contextmanager
def detector_folder(model: str | Path) -> Iterator[Path]:
    """The detector folder of a run's folder, or `model` itself if it is one; of a URI a copy within the block.

    Raises AssetError if there is none.
    """
    with places.opened(model, *places.DETECTOR_FILES) as place:
        for folder in (place.here / "detector", place.here):
            if (folder / "detector.json").is_file():
                yield folder
                return
        if (place.here / "config.yaml").is_file():
            raise AssetError(f"the run {model} has no detector yet; finish it with `kka resume {model}`")
        what = "holds no detector" if place.here.is_dir() else "is no folder"
        raise AssetError(f"{model} {what}; name the folder of a finished run, or its detector/ folder")


def load_detector(model: str | Path, device: str = "cpu", engine: Engine = "torch") -> TunedDetector:
    """The detector of a run's folder, or in a detector folder, which may be a URI. Raises AssetError if there is none,
    ConfigError if the engine cannot run."""
    with detector_folder(model) as folder:
        return TunedDetector.load(folder, device=device, engine=engine)


def judge(tuned: TunedDetector, images: Sequence[np.ndarray], heat: bool) -> tuple[Scores, np.ndarray | None]:
    """Scores of uint8 images (H, W, 3), and if asked for their heat (N, h, w), as `TunedDetector.heatmap` gives it.

    The heat is None as well if the detector does not localise. Features are extracted once for both.
    """
    features = tuned.extract(images)
    return tuned.score(features), tuned.heatmap(features) if heat else None


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Heat (h, w) from `judge` laid over an image, uint8 (H, W, 3), in yellow to red; at most 1024 px a side.

    Clear where the heat is 0, that is as hot as a typical normal image gets anywhere, or less.
    """
    height, width = image.shape[:2]
    scale = min(1.0, _OVERLAY_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size != (height, width):
        image = np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    grid = torch.from_numpy(np.ascontiguousarray(heat, np.float32))[None, None]
    full = F.interpolate(grid, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    level = np.clip(full / max(_HOT, float(full.max())), 0, 1)[..., None]
    colour = np.concatenate([np.full_like(level, 255), 255 * (1 - level), np.zeros_like(level)], axis=2)
    opacity = 0.75 * np.sqrt(level)
    return np.rint((1 - opacity) * image + opacity * colour).astype(np.uint8)


def score_folder(
    images: Path,
    model: str | Path,
    output: Path,
    *,
    heatmaps: bool,
    console: Console,
    engine: Engine = "torch",
    max_pixels: int = MAX_PIXELS,
) -> ScoreResult:
    """Scores an image, or every image below a folder, with a run's detector.

    Into `output` go `scores.csv` (a row a file, in the order of the paths), `contact_sheet.png` (the 100 most anomalous
    images, the most anomalous first) and, if asked for and the detector localises, `heatmaps/FILE.png` (a name that is
    too long for that is cut, and ends in a hash). All of it is written elsewhere first and put in place at the end;
    what an earlier scoring left in `output` is replaced.

    A file that cannot be read is a row with the error. Raises AssetError without a detector; DataError without images
    or if `output` holds files of these names that are something else; ResourceError if it cannot be written.
    """
    tuned = load_detector(model, engine=engine)
    files = _find(images)
    if not files:
        raise DataError(f"{images} holds no image ({', '.join(sorted(SUFFIXES))}); name an image or a folder with some")
    there = [output / name for name in _MADE if (output / name).exists()]
    if there and not _is_scoring(output):
        raise DataError(f"{there[0]} was not made by a scoring; choose another --output, or move it away")
    fresh = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        # In it and not beside it: it may be a mounted disk of its own.
        with tempfile.TemporaryDirectory(dir=output, prefix=".scoring-") as temporary:
            work = Path(temporary)
            result = _score(files, tuned, work, heatmaps, console, max_pixels)
            _put_in_place(work, output)
    except OSError as error:
        raise ResourceError(f"cannot write the scores into {output}: {error}") from error
    finally:
        if fresh:
            with suppress(OSError):
                output.rmdir()  # of nothing, where it was not reached
    return result


def _score(
    files: Sequence[tuple[str, Path]],
    tuned: TunedDetector,
    work: Path,
    heatmaps: bool,
    console: Console,
    max_pixels: int,
) -> ScoreResult:
    rows: dict[str, _Row] = {}
    sheet: list[tuple[_Row, Image.Image]] = []
    bars = Progress(
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    localises = True
    with bars:
        task = bars.add_task("scoring", total=len(files))
        for names, batch in _batches(files, rows, max_pixels):
            scores, heat = judge(tuned, batch, heatmaps)
            localises = not heatmaps or heat is not None
            for i, name in enumerate(names):
                row = _Row(
                    name,
                    score=float(scores.score[i]),
                    robust_z=float(scores.robust_z[i]),
                    percentile=float(scores.percentile[i]),
                    anomalous=bool(scores.anomalous[i]),
                )
                rows[name] = row
                sheet.append((row, _thumbnail(batch[i])))
                if heat is not None:
                    target = work / "heatmaps" / _map_name(name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(encode_png(overlay(batch[i], heat[i])))
            sheet = sorted(sheet, key=lambda entry: (-entry[0].score, entry[0].file))[:_SHEET_IMAGES]
            bars.update(task, completed=len(rows))
        bars.update(task, completed=len(rows))
    if not localises:
        console.print(f"the detector {tuned.config.kind} does not localise: no heat maps", highlight=False)
    if sheet:
        _contact_sheet(sheet).save(work / "contact_sheet.png")
    _write_csv(work / "scores.csv", [rows[name] for name, _ in files])
    errors = [rows[name].error for name, _ in files if rows[name].error]
    anomalous = sum(row.anomalous for row in rows.values())
    return ScoreResult(len(rows) - len(errors), anomalous, len(errors), errors[0] if errors else "")


def _map_name(name: str) -> str:
    """What the heat map of an image is called. A name that leaves no room for the suffix is cut, and ends in a hash."""
    folder, slash, last = name.rpartition("/")
    raw = os.fsencode(last)
    if len(raw) + len(".png") > _LONGEST_NAME:
        end = f"~{hashlib.sha256(raw).hexdigest()[:8]}"
        last = raw[: _LONGEST_NAME - len(f"{end}.png")].decode(errors="ignore") + end
    return f"{folder}{slash}{last}.png"


def _find(images: Path) -> list[tuple[str, Path]]:
    """(name, path) of the images, sorted by name; hidden files and what scorings made are left out."""
    if images.is_file():
        return [(images.name, images)]
    if not images.is_dir():
        raise DataError(f"there is no image or folder {images}")
    is_scoring = cache(_is_scoring)

    def made(path: Path) -> bool:
        real = Path(os.path.realpath(path))  # `resolve` raises on a link to itself
        return any(is_scoring(part.parent) for part in (real, *real.parents) if part.name in _MADE)

    files = image_files(images, recursive=True)
    return [(path.relative_to(images).as_posix(), path) for path in files if not made(path)]


def _is_scoring(folder: Path) -> bool:
    """Whether a scoring was put into the folder: its table is told by the columns."""
    try:
        with (folder / "scores.csv").open(encoding="utf-8", errors="replace") as stream:
            return stream.readline().rstrip("\n") == ",".join(COLUMNS)
    except OSError:
        return False


def _batches(
    files: Sequence[tuple[str, Path]], rows: dict[str, _Row], max_pixels: int
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Names and images of those files that can be read; the others are put into `rows`."""
    names: list[str] = []
    images: list[np.ndarray] = []
    pixels = 0
    for name, path in files:
        try:
            image = read_image(path, name, max_pixels)
        except (DataError, OSError) as error:
            # One bad file must not end the scoring of thousands; its row says what is wrong with it.
            rows[name] = _Row(name, error=" ".join(str(error).split()))
            continue
        names.append(name)
        images.append(image)
        pixels += image.shape[0] * image.shape[1]
        if len(images) == BATCH_IMAGES or pixels >= BATCH_PIXELS:
            yield names, images
            names, images, pixels = [], [], 0
    if images:
        yield names, images


def _write_csv(path: Path, rows: Sequence[_Row]) -> None:
    # File names need not be valid UTF-8; they are written as the bytes that they are.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row.cells() for row in rows)


def _put_in_place(work: Path, output: Path) -> None:
    """Moves what was made into `output`, and what lay there into `work`, to go with it.

    Interrupted anywhere, it leaves no heat maps without a table, which would be taken for something else's, nor beside
    another scoring's.
    """
    if (output / "heatmaps").exists():
        (output / "heatmaps").rename(work / "replaced")
    (output / "contact_sheet.png").unlink(missing_ok=True)
    for name in _MADE:
        if (work / name).exists():
            (work / name).rename(output / name)


def _thumbnail(image: np.ndarray) -> Image.Image:
    """The image inside a square, enlarged by whole pixels if it is small."""
    picture = Image.fromarray(image)
    scale = _THUMBNAIL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    inside = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR)
    square = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "white")
    square.paste(inside, ((_THUMBNAIL - size[0]) // 2, (_THUMBNAIL - size[1]) // 2))
    return square


def _contact_sheet(entries: Sequence[tuple[_Row, Image.Image]]) -> Image.Image:
    columns = min(10, len(entries))
    width, height = _THUMBNAIL + 12, _THUMBNAIL + 46
    sheet = Image.new("RGB", (columns * width + 12, -(-len(entries) // columns) * height + 12), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for i, (row, picture) in enumerate(entries):
        x, y = 12 + i % columns * width, 12 + i // columns * height
        colour = "#b00020" if row.anomalous else "#1b5e20"
        sheet.paste(picture, (x, y))
        draw.text((x, y + _THUMBNAIL + 2), f"{row.score:.4g}  {verdict(row.anomalous)}", fill=colour, font=font)
        # Letters beyond the built-in font would be drawn as boxes.
        name = row.file[-20:].encode("ascii", "replace").decode()
        draw.text((x, y + _THUMBNAIL + 17), name, fill="#555555", font=font)
    return sheet

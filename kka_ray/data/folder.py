"""A plain folder of images: normals directly in it, in `good/`, or laid out as in MVTec AD."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kka_ray.amounts import amount
from kka_ray.config.models import FolderData
from kka_ray.data.base import DataModule, ImageSet, Normals
from kka_ray.data.captions import fill, without_article
from kka_ray.data.decode import TooLargeError, decode
from kka_ray.data.splits import MIN_VALIDATION, draw_groups, drop_seen, split_by_group, split_normals
from kka_ray.errors import DataError
from kka_ray.memory import usable_memory

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""Of images in the formats that are read."""

_FOREIGN = frozenset(
    {".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".dng", ".psd", ".exr"}
)
"""Of images in formats that are not read: they are listed as unreadable, not passed over. Files with other suffixes,
and hidden files, are not taken for images."""

_IMAGES = SUFFIXES | _FOREIGN

_DARK = 32
"""Of 255: less is what an eighth of the range or less is used of, as where 12 bits were taken for 16."""

GOOD = "good"

TEMPLATES = (
    "a photo of {}",
    "a close-up of {}",
    "a picture of {}",
    "{} in the middle of the picture",
    "a sharp photo of {}",
)

# An uncompressed 16-bit RGBA image takes eight bytes a pixel; a longer file need not even be read.
_BYTES_PER_PIXEL = 8
_HEADER_BYTES = 1_000_000
_SHARE_OF_MEMORY = 0.5
"""That the decoded images may take: they stay while the run lasts."""


class FolderModule(DataModule):
    """Normals: the images of `train/good`, else of `good`, else those directly in the folder. Test: `test/`.

    The first of the three layouts that is there is taken. `good` folders are read with their sub-folders, in the
    order of the paths; the folder itself is not. `test/good` holds normal test images and every other folder below
    `test` one kind of defect, its name the class.

    A caption comes from the CSV `captions` where it is given (`file` relative to the data folder or to the folder of
    the normals; a relative `captions` is looked up in the data folder), else from the first line of a text file of the
    image's name, else from a template with the description. A CSV must caption every normal image that can be read;
    test images may go without.

    Files that cannot be read or are too large are skipped: listed in `skipped`, counted in `Normals.dropped`.
    """

    def __init__(self, config: FolderData, seed: int) -> None:
        """Raises DataError if the path is no folder, or if its test part has defects and nothing to compare them with.

        Looks at names only, for which a run need not come to its end.
        """
        self.config = config
        self.seed = seed
        self.root = Path(config.path)
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise DataError(f"data.path: {self.root} {what}; it must be a folder of images")
        self.subject = config.description.strip()
        self.normal_terms = (without_article(self.subject),)
        self.skipped: list[tuple[str, str]] = []
        present = {kind for _, kind in self._test_files()}
        if present and GOOD not in present:
            raise DataError(
                f"{self.root / 'test'} holds defects ({', '.join(sorted(present))}) but no normal images in good/, and "
                "a test compares both; add some, or move the folder away"
            )

    def normals(self) -> Normals:
        """See `DataModule.normals`. Raises DataError as well if there is no image, none can be read, or the captions
        do not fit the files."""
        return self._normals

    def look(self) -> None:
        """See `DataModule.look`: of the names of images, the captions and the group."""
        files = [file for file in self._normal_files() if file.suffix.lower() in SUFFIXES]  # others are not read
        if self.config.captions is not None:
            self._captions(files, [GOOD] * len(files), required=True)
        if files:
            self._groups([self._name(file) for file in files])

    def count(self) -> int:
        """How many files are named like normal images. Raises DataError if none is."""
        return len(self._normal_files())

    @cached_property
    def _normals(self) -> Normals:
        folder, files = self._normal_folder(), self._normal_files()
        loaded = self._load(files)
        self._note(loaded.skipped)
        self._refuse_if_none(loaded, folder)
        self._warn_if_dark(loaded, folder)
        images = self._image_set(loaded, [GOOD] * len(loaded.files), captions_required=True)
        groups = self._groups(images.ids)
        if groups is None:
            return split_normals(images, self.config.validation, self.seed, str(folder), loaded.counts())
        return self._split(images, groups, loaded)

    def _split(self, images: ImageSet, groups: Sequence[str], loaded: _Loaded) -> Normals:
        """A share of the groups validates, or more where these have too few images; the others train."""
        total = len(set(groups))
        if total < 2:
            raise DataError(
                f"data.group: {self.config.group!r} finds {groups[0]!r} in all {len(groups)} names, and one object "
                "cannot both train and validate; correct it, or leave it out"
            )
        least = min(max(1, round(self.config.validation * total)), total - 1)
        drawn = [draw_groups(groups, count, self.seed, "validation") for count in range(least, total)]
        enough = (some for some in drawn if sum(group in some for group in groups) >= MIN_VALIDATION)
        validating = next(enough, drawn[-1])
        source = f"{self._normal_folder()}, {total} different ones by data.group"
        return split_by_group(images, [group in validating for group in groups], source, loaded.counts())

    def test(self) -> ImageSet | None:
        """The images of `test/good`, then those of the defects by name; None where there are no defects.

        Raises DataError if no normal or no defective image can be read.
        """
        folder, found = self.root / "test", self._test_files()
        if {kind for _, kind in found} <= {GOOD}:
            return None
        normals = self.normals()
        # They stay in memory while the test images are there, too.
        held = sum(image.nbytes for part in (normals.train, normals.validation) for image in part.images)
        loaded = self._load([file for file, _ in found], held)
        kind_of = dict(found)
        images = self._image_set(loaded, [kind_of[file] for file in loaded.files], captions_required=False)
        kept, seen = drop_seen(images, normals)
        if kept.anomalous.all() or not kept.anomalous.any():
            lacking = "normal" if kept.anomalous.any() or not len(kept) else "defective"
            raise DataError(
                f"{folder}: no {lacking} test image is left, after {len(loaded.skipped)} that cannot be used and "
                f"{seen} that are also among the normals{_first(loaded.skipped)}; add some or remove {folder}"
            )
        self._note(loaded.skipped)
        self.test_dropped = loaded.counts() | {"duplicate": seen}
        return kept

    def _test_files(self) -> list[tuple[Path, str]]:
        """Test images with their kind, `good` first."""
        folder = self.root / "test"
        if not folder.is_dir():
            return []
        kinds = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        kinds.sort(key=lambda name: name != GOOD)
        return [(file, _text(kind)) for kind in kinds for file in image_files(folder / kind, recursive=True)]

    def _name(self, file: Path) -> str:
        return _text(file.relative_to(self.root).as_posix())

    def _normal_files(self) -> list[Path]:
        folder = self._normal_folder()
        files = image_files(folder, recursive=folder != self.root)
        if not files:
            below = folder == self.root and image_files(folder, recursive=True)
            where = f" itself, only in sub-folders (as {below[0].relative_to(folder)})" if below else ""
            raise DataError(
                f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}){where}; put the normal images into it, "
                "into good/ or into train/good/" + (", which are read with their sub-folders" if below else "")
            )
        return files

    def _groups(self, names: Sequence[str]) -> list[str] | None:
        """What each normal image shows; one whose name does not tell is by itself. None if no group is given."""
        if self.config.group is None:
            return None
        matches = [re.search(self.config.group, name) for name in names]
        told = [match and match[1] for match in matches]
        if all(group is None for group in told):
            raise DataError(
                f"data.group: {self.config.group!r} is found in no name of a normal image, as in {names[0]!r}; "
                "correct it, or leave it out"
            )
        return [f"/{name}" if group is None else group for name, group in zip(names, told, strict=True)]

    def _normal_folder(self) -> Path:
        for folder in (self.root / "train" / GOOD, self.root / GOOD):
            if folder.is_dir():
                return folder
        return self.root

    def _load(self, files: Sequence[Path], held: int = 0) -> _Loaded:
        """Decodes files, beside `held` bytes of images that are there. Raises DataError if all fill the memory."""
        loaded, allowed = _Loaded([], [], []), _SHARE_OF_MEMORY * usable_memory()
        for file in files:
            name = self._name(file)
            try:
                image = read_image(file, name, self.config.max_pixels)
            except (DataError, OSError) as error:
                # One bad file must not stop a run over thousands; it is counted and listed instead.
                reason = "too_large" if isinstance(error, TooLargeError) else "unreadable"
                loaded.skipped.append((name, f"{reason}: {error}"))
                continue
            loaded.files.append(file)
            loaded.images.append(image)
            held += image.nbytes
            if held > allowed:
                raise DataError(
                    f"{self.root}: its images up to {name}, {len(loaded.files)} of {len(files)}, alone take "
                    f"{held / 1e9:.1f} GB, more than {_SHARE_OF_MEMORY:.0%} of the memory that may be used here. The "
                    "detectors look at far smaller ones (backbone.image_size): scale them down first, as with "
                    "`mogrify -resize '1024x1024>'` on a copy"
                )
        return loaded

    def _note(self, skipped: Sequence[tuple[str, str]]) -> None:
        self.skipped += [entry for entry in skipped if entry not in self.skipped]

    def _warn_if_dark(self, loaded: _Loaded, folder: Path) -> None:
        brightest = max(int(image.max()) for image in loaded.images)
        if brightest < _DARK:
            log.warning(
                "%s: no pixel of the %d normal images is brighter than %d of 255, so they hardly differ. If they have "
                "12 bits in files of 16, multiply their values by 16 first",
                *(folder, len(loaded.images), brightest),
            )

    def _refuse_if_none(self, loaded: _Loaded, folder: Path) -> None:
        if not loaded.files:
            raise DataError(
                f"{folder}: of {amount(len(loaded.skipped), 'image')} none can be used{_first(loaded.skipped)}; "
                "replace them"
            )

    def _image_set(self, loaded: _Loaded, kinds: Sequence[str], *, captions_required: bool) -> ImageSet:
        return ImageSet(
            tuple(self._name(file) for file in loaded.files),
            tuple(loaded.images),
            self._captions(loaded.files, kinds, required=captions_required),
            tuple(kinds),
            np.array([kind != GOOD for kind in kinds], bool),
        )

    def _captions(self, files: Sequence[Path], kinds: Sequence[str], *, required: bool) -> tuple[str, ...]:
        shown = [self.subject if kind == GOOD else f"{self.subject}, {_words(kind)}" for kind in kinds]
        from_templates = fill(TEMPLATES, shown, self.seed)
        if self.config.captions is None:
            return tuple(_sidecar(f) or text for f, text in zip(files, from_templates, strict=True))
        table = self._caption_table
        lacking = [f for f in files if f not in table]
        if lacking and required:
            raise DataError(
                f"{self.config.captions} has no caption for {len(lacking)} of the normal images, the first of them "
                f"{self._name(lacking[0])}; add them, or leave data.captions out"
            )
        return tuple(table.get(f, text) for f, text in zip(files, from_templates, strict=True))

    @cached_property
    def _caption_table(self) -> Mapping[Path, str]:
        path = self.root / str(self.config.captions)
        try:
            with path.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream, strict=True)  # else a quote without its end takes in the rows below
                columns = sorted(reader.fieldnames or ())
                # What is beyond the columns lies under None.
                rows = [(reader.line_num, row.get("file"), row.get("caption"), row.get(None)) for row in reader]  # type: ignore[call-overload]
        except csv.Error as error:
            raise DataError(
                f"data.captions: {path}, below line {reader.line_num}: {error}; look there for a double quote without "
                "its other one"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"data.captions: {path} cannot be read ({error}); it must be a CSV in UTF-8 with the columns "
                "file and caption, its name relative to data.path"
            ) from error
        if columns.count("file") != 1 or columns.count("caption") != 1:
            there = ", ".join(repr(column) for column in columns) or "none"
            raise DataError(
                f"{path} must have the columns file and caption once each, separated by commas; it has {there}"
            )
        table: dict[Path, str] = {}
        for line, name, caption, more in rows:
            if any(more or ()):
                raise DataError(
                    f"{path}, line {line}: it has more cells than there are columns; put a caption with a comma in "
                    "double quotes"
                )
            text = " ".join((caption or "").split())
            if not name or not text:
                raise DataError(f"{path}, line {line}: the file or its caption is empty; fill it in or delete the line")
            file = self._captioned_file(name.strip(), f"{path}, line {line}")
            if file in table:
                raise DataError(f"{path}, line {line}: {name} has a caption already; keep one of them")
            table[file] = text
        return table

    def _captioned_file(self, name: str, where: str) -> Path:
        for folder in (self.root, self._normal_folder()):
            with suppress(OSError):  # a name that is longer than any file's may be
                if (folder / name).is_file():
                    return folder / name
        raise DataError(f"{where}: there is no file {name} below {self.root}; correct the name or delete the line")


@dataclass(frozen=True)
class _Loaded:
    """Files that could be decoded, their images, and the files that could not with the reason of each."""

    files: list[Path]
    images: list[np.ndarray]
    skipped: list[tuple[str, str]]

    def counts(self) -> dict[str, int]:
        out = {"unreadable": 0, "too_large": 0}
        for _, reason in self.skipped:
            out[reason.partition(":")[0]] += 1
        return out


def image_files(folder: Path, *, recursive: bool) -> list[Path]:
    """The images in a folder, by suffix, without hidden ones; in the order of their paths. Some may be of formats that
    are not read. Links are followed, each folder once; one that leads nowhere is a file that cannot be read. Raises
    DataError if a folder cannot be listed."""
    files = []
    try:
        for path in _walk(folder, set()) if recursive else folder.iterdir():
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.suffix.lower() in _IMAGES and not hidden and (path.is_file() or _leads_nowhere(path)):
                files.append(path)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error}); give access to it, or move it away") from error
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files below a folder."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _walk(path, seen)
        else:
            yield path


def read_image(file: Path, name: str, max_pixels: int) -> np.ndarray:
    """Pixels of an image file, as `decode` gives them and with its errors; `name` stands for it in them."""
    size = file.stat().st_size
    if size > _BYTES_PER_PIXEL * max_pixels + _HEADER_BYTES:
        raise TooLargeError(f"{name}: the file has {size} bytes, more than {max_pixels} pixels can take; scale it down")
    return decode(file.read_bytes(), name, max_pixels)


def _text(name: str) -> str:
    """A file's name as text, which is all that records and captions hold: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _sidecar(image: Path) -> str:
    """The first line with text of the image's `.txt` file; empty if there is none. Raises DataError if not UTF-8."""
    path = image.with_suffix(".txt")
    if not path.is_file():
        return ""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a caption ({error}); save it as UTF-8 text or delete it") from error
    return next((" ".join(line.split()) for line in lines if line.strip()), "")


def _first(skipped: Sequence[tuple[str, str]]) -> str:
    return f" (first: {skipped[0][1]})" if skipped else ""


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")

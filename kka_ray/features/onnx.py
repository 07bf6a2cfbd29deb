"""ONNX: networks written in its format, and image encoders that run on ONNX Runtime, often faster on a CPU."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kka_ray.errors import ConfigError

_OPSET = 18


class Encoder(Protocol):
    """See `kka_ray.features.backbone`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    network: nn.Module

    def __call__(self, images: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]: ...


class OnnxEncoder:
    """An encoder whose network runs on ONNX Runtime, on the CPU, with as many threads as torch has."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        """Raises ConfigError if ONNX is not installed. The network is translated at the first use."""
        packages()
        self.mean, self.std, self.network = encoder.mean, encoder.std, encoder.network
        self._encoder, self._size = encoder, size
        self._sessions: dict[bool, Any] = {}

    def __call__(self, images: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        if patches not in self._sessions:
            example = torch.zeros(2, 3, self._size, self._size)
            names = ["pooled", "patches"] if patches else ["pooled"]
            content = to_onnx(_Encode(self._encoder, patches), example, names)
            self._sessions[patches] = session(content)
        out = self._sessions[patches].run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(out[0]), torch.from_numpy(out[1]) if patches else None


class _Encode(nn.Module):
    def __init__(self, encoder: Encoder, patches: bool) -> None:
        super().__init__()
        self.network = encoder.network  # registered, so that its weights become those of the graph
        self._encoder: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]] = encoder
        self._patches = patches

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pooled, grid = self._encoder(images, self._patches)
        return (pooled,) if grid is None else (pooled, grid)


def to_onnx(module: nn.Module, example: Tensor, outputs: Sequence[str]) -> bytes:
    """A module of one input, `images`, as an ONNX model; the first axis of everything is free.

    Raises ConfigError if ONNX is not installed.
    """
    packages()
    buffer = io.BytesIO()
    # Inference mode, in which features are extracted, leaves nothing to trace.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        # The older exporter needs no further package; it warns that it is the older one, and of each shape it reads.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (example.clone(),),
            buffer,  # type: ignore[arg-type]  # the older exporter writes into it
            input_names=["images"],
            output_names=list(outputs),
            dynamic_axes={name: {0: "count"} for name in ("images", *outputs)},
            opset_version=_OPSET,
            dynamo=False,
        )
    return buffer.getvalue()


def session(content: bytes) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU with torch's number of threads."""
    runtime = packages()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def packages() -> Any:
    """The module `onnxruntime`. Raises ConfigError, saying how to install them, if it or `onnx` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs the packages onnx and onnxruntime ({error}): pip install -c requirements/lock.txt -e '.[onnx]'"
        ) from error
    return onnxruntime

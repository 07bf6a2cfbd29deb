"""EfficientNet-Lite0: the built-in image backbone.

Tan and Le, "EfficientNet" (ICML 2019), in the Lite variant: no squeeze-and-excitation, ReLU6 for swish, stem and head
of fixed width. Parameters are named as in the checkpoint. Convolutions pad as TensorFlow's 'same' does, which puts the
odd pixel at the right and at the bottom; that is why they cannot use `padding=` where the stride is 2.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kka_ray.errors import AssetError

_STAGES = (
    # kernel, stride, expansion, channels in, channels out, blocks
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)
WIDTH = 1280
"""Channels of the last map."""
_EPSILON = 1e-3  # TensorFlow's; PyTorch's default is 1e-5
_STRIDE_8 = 4  # index of the last block of 40 channels
_STRIDE_16 = 10  # index of the last block of 112 channels


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's 'same' padding; kernels are square."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max(((n - 1) // stride) * stride + kernel - n, 0) for n in x.shape[-2:])
        if height % 2 == 0 and width % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, (height // 2, width // 2), 1, self.groups)
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(width: int) -> nn.Module:
    return nn.BatchNorm2d(width, eps=_EPSILON)


class Block(nn.Module):
    """Inverted residual: expand by 1x1, depthwise convolution, project by 1x1."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands = expansion > 1
        self.residual = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = _conv(inputs, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _conv(wide, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The network without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks = []
        for kernel, stride, expansion, inputs, outputs, repeats in _STAGES:
            for i in range(repeats):
                first = i == 0
                blocks.append(Block(kernel, stride if first else 1, expansion, inputs if first else outputs, outputs))
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _conv(320, WIDTH, 1)
        self._bn1 = _norm(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of normalised images (N, 3, H, W): stride 8 (N, 40, ..), 16 (N, 112, ..) and 32 (N, 1280, ..)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        middle = {}
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in (_STRIDE_8, _STRIDE_16):
                middle[i] = x
        return middle[_STRIDE_8], middle[_STRIDE_16], F.relu6(self._bn1(self._conv_head(x)))

    def fold(self) -> EfficientNetLite0:
        """Folds each batch norm into the convolution before it, for inference only; returns itself."""
        _fold(self, "_conv_stem", "_bn0")
        _fold(self, "_conv_head", "_bn1")
        for block in self._blocks:
            if "_expand_conv" in block._modules:
                _fold(block, "_expand_conv", "_bn0")
            _fold(block, "_depthwise_conv", "_bn1")
            _fold(block, "_project_conv", "_bn2")
        return self


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = getattr(module, conv_name), getattr(module, norm_name)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    conv.weight = nn.Parameter((conv.weight * scale[:, None, None, None]).detach(), requires_grad=False)
    conv.bias = nn.Parameter((norm.bias - norm.running_mean * scale).detach(), requires_grad=False)
    setattr(module, norm_name, nn.Identity())


def load(folder: Path) -> EfficientNetLite0:
    """The network with the weights in `folder`, frozen, batch norms folded. Raises AssetError if they do not fit."""
    network = EfficientNetLite0()
    file = folder / "model.safetensors"
    try:
        weights = load_file(file)
    except OSError as error:
        raise AssetError(f"cannot read the weights {file}: {error}; run `kka setup` again") from error
    missing, unexpected = network.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise AssetError(
            f"{file} does not hold EfficientNet-Lite0: {len(missing)} parameters are missing (such as {missing[:1]}), "
            f"{len(unexpected)} are unknown (such as {unexpected[:1]}); delete its folder and run `kka setup`"
        )
    return network.eval().requires_grad_(False).fold()

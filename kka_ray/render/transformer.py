"""The built-in text-to-image network: a small diffusion transformer on pixel patches.

The token states of the text are gathered by cross-attention into a few learned word slots, which form one sequence
with the patches of the noisy image: a sequence is what costs time, and texts are padded. Time and the pooled text
modulate every block through one shared projection and a table a block (adaptive norm, PixArt's way). The network
predicts the clean image, from which the flow's velocity follows: with large patches the clean image lies on a thin
manifold that a narrow network can reach, while noise does not (after Li and He, "Back to Basics", 2025).

Patches that are drawn side by side show their seams. With `overlap` a token sees and draws more than its patch, and
what several draw is added up.
"""

from __future__ import annotations

import math

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.nn import functional

# diffusers finds the loading method of a component by looking for its base class in the module that defines it.
__all__ = ["FlowTransformer", "ModelMixin"]


class FlowTransformer(ModelMixin, ConfigMixin):
    """Predicts the clean image from a noisy one, a time and a text.

    Args:
        image_size: side of the square images, in pixels; a multiple of `patch`.
        patch: side of a patch, in pixels. The sequence has (image_size / patch)^2 image tokens.
        width: width of a token; a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        text_width: width of the text encoder's token states.
        max_text_tokens: longer texts are cut.
        word_slots: tokens that the text takes in the sequence.
        overlap: pixels by which what a token sees and draws reaches into the patches around its own.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch: int = 8,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        text_width: int = 384,
        max_text_tokens: int = 32,
        word_slots: int = 8,
        overlap: int = 0,
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads:
            raise ValueError(f"image_size {image_size} / patch {patch} and width {width} / heads {heads} must be whole")
        self.side = patch + 2 * overlap
        self.patch_in = nn.Linear(3 * self.side**2, width)
        self.text_in = nn.Linear(text_width, width)
        self.no_text = nn.Parameter(torch.zeros(1, 1, text_width))
        self.image_position = nn.Parameter(torch.randn(1, (image_size // patch) ** 2, width) * 0.02)
        self.text_position = nn.Parameter(torch.randn(1, max_text_tokens, width) * 0.02)
        self.slots = nn.Parameter(torch.randn(1, word_slots, width) * 0.5)
        self.gather = nn.MultiheadAttention(width, heads, batch_first=True)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled_in = nn.Linear(text_width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, 3 * self.side**2)
        for layer in (self.modulation[1], self.modulation_out, self.patch_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The clean image (B, 3, H, W) in [-1, 1] as far as it can be told.

        Args:
            noisy: (B, 3, H, W), `time * image + (1 - time) * noise`.
            time: (B,) in [0, 1]; 0 is noise.
            text: token states (B, T, text_width).
            mask: (B, T), true where there is a token. A row without any is drawn without text.
        """
        has_text = mask.any(1)[:, None, None]
        first = torch.zeros_like(mask)
        first[:, 0] = True
        text = torch.where(has_text, text, self.no_text.to(text.dtype))
        mask = torch.where(has_text[:, 0], mask, first)

        weights = mask[..., None].to(text.dtype)
        pooled = (text * weights).sum(1) / weights.sum(1)
        condition = self.time_in(_time_embedding(time).to(text.dtype)) + self.pooled_in(pooled)
        modulation = self.modulation(condition).view(len(noisy), 6, -1)

        words = self.text_in(text) + self.text_position[:, : text.shape[1]]
        slots = self.slots.expand(len(noisy), -1, -1)
        slots = slots + self.gather(slots, words, words, key_padding_mask=~mask, need_weights=False)[0]
        image = self.patch_in(self._to_patches(noisy)) + self.image_position
        tokens = torch.cat([slots, image], 1)
        for block in self.blocks:
            tokens = block(tokens, modulation)
        shift, scale = self.modulation_out(functional.silu(condition))[:, None].chunk(2, -1)
        out = self.norm_out(tokens[:, slots.shape[1] :]) * (1 + scale) + shift
        return self._to_image(self.patch_out(out), noisy.shape[-1])

    def overlapping(self, overlap: int) -> FlowTransformer:
        """A network with another overlap, at least its own, that draws what this one draws until it is trained."""
        more = overlap - self.config.overlap
        wider = FlowTransformer(**(dict(self.config) | {"overlap": overlap}))

        def spread(pixels: Tensor) -> Tensor:
            """(3 * side^2, N) with zeros around each patch."""
            patches = pixels.view(3, self.side, self.side, -1).movedim(-1, 0)
            return functional.pad(patches, (more,) * 4).flatten(1).T

        state = self.state_dict()
        state["patch_in.weight"] = spread(state["patch_in.weight"].T).T
        state["patch_out.weight"] = spread(state["patch_out.weight"])
        state["patch_out.bias"] = spread(state["patch_out.bias"][:, None])[:, 0]
        wider.load_state_dict(state)
        return wider

    def _to_patches(self, image: Tensor) -> Tensor:
        """(B, N, 3 * side^2) of (B, 3, H, W); beyond the image there are zeros."""
        patch, overlap = self.config.patch, self.config.overlap
        return functional.unfold(image, self.side, padding=overlap, stride=patch).transpose(1, 2)

    def _to_image(self, patches: Tensor, size: int) -> Tensor:
        """The inverse: patches are added where they overlap, and end with the image."""
        patch, overlap = self.config.patch, self.config.overlap
        return functional.fold(patches.transpose(1, 2), size, self.side, padding=overlap, stride=patch)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(1, 6, width) / math.sqrt(width))
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.sqrt(width / heads)))
        self.attention_out = nn.Linear(width, width)
        # The exact function: in bfloat16 on a CPU its approximation by tanh takes four times as long.
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.table).chunk(6, 1)
        tokens = tokens + gate_a * self._attention(self.norm_attention(tokens) * (1 + scale_a) + shift_a)
        return tokens + gate_m * self.mlp(self.norm_mlp(tokens) * (1 + scale_m) + shift_m)

    def _attention(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Normalised queries and keys keep training stable. Plain products beat the fused kernel on CPUs at this length.
        query = functional.normalize(query, dim=-1) * self.scale.to(query.dtype)
        weights = (query @ functional.normalize(key, dim=-1).transpose(-1, -2)).softmax(-1)
        mixed = weights.to(value.dtype) @ value
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))


def _time_embedding(time: Tensor) -> Tensor:
    """Sinusoidal embedding (B, 256) of times in [0, 1], in float32."""
    frequencies = torch.exp(torch.arange(128, device=time.device) * (-math.log(10_000.0) / 128))
    angles = 1000.0 * time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)

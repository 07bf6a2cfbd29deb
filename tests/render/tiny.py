"""Tiny, randomly initialised diffusers pipelines, and a text encoder that needs no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from kka_ray.render.pipeline import KkaFlowPipeline
from kka_ray.render.transformer import FlowTransformer


class FakeTextEncoder:
    """Takes the place of MiniLM: a word's state is random, drawn from its hash."""

    identity = "fake"

    def __init__(self, reference: str = "", device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)

    def tokens(self, texts: Sequence[str], max_tokens: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
        words = [["<s>", *text.split(), "</s>"][:max_tokens] for text in texts]
        states = torch.zeros(len(texts), max(map(len, words)), 384)
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        for row, line in enumerate(words):
            for column, word in enumerate(line):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
                states[row, column] = torch.randn(384, generator=torch.Generator().manual_seed(seed))
                mask[row, column] = True
        return states, mask


def flow_transformer(**settings: int) -> FlowTransformer:
    """A network of 32 px that was not trained, but whose output depends on everything."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2, "max_text_tokens": 16}
    network = FlowTransformer(**{**sizes, **settings})
    with torch.no_grad():
        for layer in (network.modulation[1], network.modulation_out, network.patch_out):
            layer.weight.normal_(0, 0.2)
    return network.eval()


def flow_pipeline(**settings: int) -> KkaFlowPipeline:
    return KkaFlowPipeline(flow_transformer(**settings), FlowMatchEulerDiscreteScheduler())


def _tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=32,
        shift_factor=0.06,
    )


def stable_diffusion(folder: Path) -> Path:
    """Saves a latent diffusion pipeline of 32 px, without a safety checker, into `folder`."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder.with_name("tokenizer"))
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        vae=_autoencoder(4),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def stable_diffusion_3(folder: Path) -> Path:
    """Saves a flow-matching latent pipeline of 32 px, without the T5 encoder, into `folder`."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder.with_name("tokenizer"))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(16),
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    return folder

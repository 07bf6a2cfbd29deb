from collections.abc import Callable

import pytest
import torch

from kka_ray.config.models import BackboneConfig
from kka_ray.features.backbone import Backbone


@pytest.fixture(scope="session")
def save_resnet(tmp_path_factory) -> Callable[[int], str]:
    """Saves a tiny ResNet with random weights of a seed; returns its folder."""
    from transformers import ResNetConfig, ResNetModel

    def save(seed: int) -> str:
        folder = tmp_path_factory.mktemp("resnet")
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic")
        ResNetModel(config).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def backbone(save_resnet) -> Backbone:
    """A tiny backbone with random weights, for images of 64 px."""
    return Backbone.load(BackboneConfig(model=save_resnet(0), image_size=64))

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kka_ray import assets
from kka_ray.config.models import BackboneConfig
from kka_ray.errors import AssetError, ConfigError, DataError
from kka_ray.features.backbone import Backbone
from kka_ray.features.pixels import pixels, resize

_BUILTIN = "builtin:efficientnet-lite0"
needs_builtin = pytest.mark.skipif(not assets.is_present(_BUILTIN), reason="needs EfficientNet-Lite0: run `kka setup`")


def _images(count: int, size: int = 32, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=64, patch_size=16, **sizes)).save_pretrained(folder)
    return folder


def test_resizing_up_is_plain_bilinear():
    (image,) = _images(1)
    expected = F.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(), (96, 96), mode="bilinear", align_corners=False
    )
    assert torch.equal(resize(image, 0, 96), expected[0])


def test_resizing_down_averages():
    board = ((np.indices((192, 192)).sum(0) % 2) * 255).astype(np.uint8)
    inner = resize(board, 0, 48)[:, 4:-4, 4:-4]
    assert float((inner - 127.5).abs().max()) < 8  # without antialiasing a checkerboard stays black and white


def test_pixels_keep_small_images_and_shrink_others_by_averaging():
    image = _images(1)[0]
    board = ((np.indices((256, 320)).sum(0) % 2) * 255).astype(np.uint8)
    small = pixels([image, board, image[:, :, :1]])
    assert np.array_equal(small[0], image)
    assert np.abs(small[1, 4:-4, 4:-4].astype(float) - 127.5).max() < 8
    assert np.array_equal(small[2], image[:, :, :1].repeat(3, axis=2))
    assert pixels([]).shape == (0, 32, 32, 3)


@needs_builtin
def test_features_of_the_builtin_backbone():
    backbone = Backbone.load(BackboneConfig())
    features = backbone.extract(_images(3), patches=True)
    assert features.pooled.shape == (3, 1280)
    assert features.pooled.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features.pooled, axis=1), 1, atol=1e-5)
    assert features.patches is not None
    assert features.patches.shape == (3, 12, 12, 152)
    assert features.patches.dtype == np.float16
    assert backbone.extract(_images(1), patches=False).patches is None


@needs_builtin
def test_features_do_not_depend_on_the_batch():
    images = _images(20)
    together = Backbone.load(BackboneConfig()).extract(images, patches=True)
    alone = Backbone.load(BackboneConfig(batch=3)).extract(images[::-1], patches=True)
    np.testing.assert_allclose(together.pooled, alone.pooled[::-1], atol=1e-5)
    assert together.patches is not None
    assert alone.patches is not None
    # Patches are float16: the last digit may differ.
    np.testing.assert_allclose(together.patches, alone.patches[::-1], atol=1e-2, rtol=2e-3)


@needs_builtin
def test_grey_is_rgb_with_equal_channels_and_sizes_may_differ():
    backbone = Backbone.load(BackboneConfig())
    grey = _images(1, 50)[0][:31, :, 0]
    both = backbone.extract([grey, np.repeat(grey[..., None], 3, axis=2), *_images(1, 130)], patches=False)
    np.testing.assert_allclose(both.pooled[0], both.pooled[1], atol=1e-5)
    assert np.isfinite(both.pooled).all()


def test_a_vision_transformer_gives_its_token_grid(vit):
    backbone = Backbone.load(BackboneConfig(model=str(vit), image_size=96))
    features = backbone.extract(_images(2), patches=True)
    assert features.pooled.shape == (2, 16)
    assert features.patches is not None
    assert features.patches.shape == (2, 6, 6, 16)  # 96 / 16; the model was made for 64 px
    mean = features.patches.astype(np.float32).mean((1, 2))
    cosine = (mean * features.pooled).sum(1) / np.linalg.norm(mean, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-4)  # the class token is left out


def test_a_convolutional_network_gives_the_maps_of_stride_8_and_16(resnet):
    features = Backbone.load(BackboneConfig(model=str(resnet), image_size=64)).extract(_images(2), patches=True)
    assert features.pooled.shape == (2, 20)
    assert features.patches is not None
    assert features.patches.shape == (2, 8, 8, 12 + 16)


@pytest.mark.parametrize("side", [64, 100, 90, 75])
def test_the_maps_are_found_whatever_the_size(resnet, side):
    """Some sides are rounded up by the network."""
    features = Backbone.load(BackboneConfig(model=str(resnet), image_size=side)).extract(_images(1), patches=True)
    assert features.patches is not None
    assert features.patches.shape == (1, -(-side // 8), -(-side // 8), 12 + 16)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_models_own_statistics_are_used(resnet, file):
    images = _images(1)
    config = BackboneConfig(model=str(resnet), image_size=64)
    before = Backbone.load(config)
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    path = resnet / file
    path.write_text(json.dumps(said if file.startswith("pre") else {"image_processor": said}))
    try:
        after = Backbone.load(config)
    finally:
        path.unlink()
    one, other = (backbone.extract(images, patches=False).pooled for backbone in (before, after))
    assert np.abs(one - other).max() > 1e-4
    assert before.identity != after.identity


def test_a_patch_larger_than_the_image_is_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=64, patch_size=64, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="image_size"):
        Backbone.load(BackboneConfig(model=str(tmp_path), image_size=32))


def test_a_text_model_is_no_backbone(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(AssetError, match="no image backbone"):
        Backbone.load(BackboneConfig(model=str(tmp_path)))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(AssetError, match="cannot be read"):
        Backbone.load(BackboneConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([np.zeros((8, 8, 3), np.float32)], "float32"),
        ([np.zeros((8, 8, 4), np.uint8)], r"\(8, 8, 4\)"),
        ([np.zeros((0, 8, 3), np.uint8)], r"\(0, 8, 3\)"),
    ],
)
def test_unsuitable_images_are_refused(resnet, images, message):
    backbone = Backbone.load(BackboneConfig(model=str(resnet), image_size=64))
    with pytest.raises(DataError, match=message):
        backbone.extract(images, patches=False)

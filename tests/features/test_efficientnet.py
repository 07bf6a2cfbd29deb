import pytest
import torch
from safetensors.torch import save_file

from kka_ray.errors import AssetError
from kka_ray.features import efficientnet
from kka_ray.features.efficientnet import EfficientNetLite0, SameConv


def _random_network(seed: int) -> EfficientNetLite0:
    network = EfficientNetLite0().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith(("running_var", "_bn0.weight", "_bn1.weight", "_bn2.weight")):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return network


@pytest.mark.parametrize(("size", "stride", "expected"), [(96, 2, 48), (97, 2, 49), (12, 1, 12), (5, 2, 3)])
def test_same_padding_gives_the_ceiling_of_size_over_stride(size, stride, expected):
    conv = SameConv(1, 1, 3, stride, bias=False)
    assert conv(torch.zeros(1, 1, size, size)).shape[-2:] == (expected, expected)


def test_odd_padding_goes_to_the_right_and_the_bottom():
    # Even size, stride 2, kernel 3: one pixel of padding in all. TensorFlow puts it behind, PyTorch in front.
    conv = SameConv(1, 1, 3, 2, bias=False)
    conv.weight.data.zero_()
    conv.weight.data[0, 0, 0, 0] = 1
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert conv(image)[0, 0].tolist() == [[0.0, 2.0], [8.0, 10.0]]


def test_maps_have_the_strides_and_widths_of_the_network():
    with torch.inference_mode():
        shapes = [tuple(x.shape[1:]) for x in EfficientNetLite0().eval()(torch.zeros(2, 3, 96, 96))]
    assert shapes == [(40, 12, 12), (112, 6, 6), (1280, 3, 3)]


def test_folding_batch_norms_changes_nothing_but_rounding():
    network = _random_network(0)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = network(x)
        after = network.fold()(x)
    for a, b in zip(before, after, strict=True):
        assert float(a.std()) > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    assert not [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_weights_of_something_else_are_refused(tmp_path):
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(AssetError, match="does not hold EfficientNet-Lite0"):
        efficientnet.load(tmp_path)


def test_missing_weights_are_reported(tmp_path):
    with pytest.raises(AssetError, match="kka setup"):
        efficientnet.load(tmp_path)

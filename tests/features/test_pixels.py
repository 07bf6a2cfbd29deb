import numpy as np
import pytest
import torch

from kka_ray.errors import DataError
from kka_ray.features.pixels import _interpolate, resize, resize_all


def _images(count: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(32, 32, 3), (150, 90, 3), (96, 96, 3), (256, 256, 3), (20, 130, 3), (40, 40)])
def test_images_resized_together_are_equal_to_the_bit_to_each_alone(shape: tuple[int, ...]) -> None:
    images = _images(5, *shape)
    together = resize_all(images, 0, 96)
    assert together.shape == (5, 3, 96, 96)
    assert torch.equal(together, torch.stack([resize(x, 0, 96) for x in images]))


def test_large_images_are_resized_one_by_one_which_takes_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = _images(5, 120, 90, 3), []

    def noted(x: torch.Tensor, size: int) -> torch.Tensor:
        sizes.append(len(x))
        return _interpolate(x, size)

    monkeypatch.setattr("kka_ray.features.pixels._interpolate", noted)
    monkeypatch.setattr("kka_ray.features.pixels._TOGETHER", 4 * 120 * 90)
    together = resize_all(images, 0, 96)
    assert sizes == [1] * 5
    assert len(resize_all(images[:4], 0, 96)) == sizes[-1] == 4
    assert torch.equal(together, _interpolate(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float(), 96))


def test_images_of_many_shapes_and_faulty_ones() -> None:
    mixed = [*_images(2, 32, 32, 3), *_images(1, 40, 20, 3), *_images(1, 32, 32)]
    assert torch.equal(resize_all(mixed, 0, 64), torch.stack([resize(x, 0, 64) for x in mixed]))
    with pytest.raises(DataError, match="image 7 has type float64"):
        resize_all([mixed[0], mixed[0].astype(float)], 6, 64)
    with pytest.raises(DataError, match="image 6 has shape"):
        resize_all(_images(2, 32, 32, 4), 6, 64)

"""BEAT-GAN and GenIAS: their losses, worked out by hand or by torch's own distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from kka_ray.detectors.beatgan.loss import discriminator_loss, errors, relative_inverse
from kka_ray.detectors.genias.loss import divergence, margins, squared_error


def test_the_divergence_is_that_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 5, 3, generator=generator)
    wanted = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 0.5)).mean(1)
    torch.testing.assert_close(divergence(mean, log_variance, 0.5), wanted)


def test_a_perturbed_image_costs_what_it_leaves_the_margins_by():
    change = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9])
    torch.testing.assert_close(margins(torch.ones(5), 1 + change, 0.1, 0.5), torch.tensor([0.1, 0, 0, 0, 0.4]))


def test_the_discriminator_is_to_score_real_images_high():
    certain, wrong = (torch.tensor([[4.0], [4.0]]), torch.tensor([[-4.0], [-4.0]]))
    assert float(discriminator_loss(certain, wrong)) == pytest.approx(4 * math.log1p(math.exp(-4)), rel=1e-5)
    assert float(discriminator_loss(wrong, certain)) == pytest.approx(4 * math.log1p(math.exp(4)), rel=1e-5)


def test_errors_are_means_over_an_image():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[1, 0] = 3.0
    for error in (errors, squared_error):
        assert error(x, y).tolist() == [0.0, 3.0]


def test_an_anomaly_costs_the_more_the_better_it_is_reconstructed():
    found = relative_inverse(0.2, torch.tensor([0.1, 0.2, 0.4]), torch.tensor([1.0, 1.0, 2.0]))
    assert float(found) == pytest.approx(2 + 1 + 2 * 0.5)

"""BEAT-GAN and GenIAS: their losses, worked out by hand or by torch's own distributions, and what each term does."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from kka_ray.config.models import BeatGan, GenIas
from kka_ray.detectors.beatgan import BeatGanDetector
from kka_ray.detectors.beatgan.loss import discriminator_loss, errors, relative_inverse
from kka_ray.detectors.genias.generator import Generator, fit_generator
from kka_ray.detectors.genias.loss import divergence, margins, squared_error
from kka_ray.detectors.pixels import ConvEncoder, PixelSets, seeded


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


def smooth_images(count: int) -> torch.Tensor:
    """(N, 3, 32, 32) in -1..1, each of a colour that changes from corner to corner."""
    corners = 1.6 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.8
    return torch.nn.functional.interpolate(corners, size=32, mode="bilinear")


def trained(x: torch.Tensor, **values: float) -> Generator:
    config = GenIas(kind="genias", maps=4, width=8, batch=16, learning_rate=3e-3, generator_epochs=20, **values)
    return fit_generator(x, config, 0, torch.Generator().manual_seed(1)).requires_grad_(False)


def test_margins_move_what_is_perturbed_into_their_range():
    x = smooth_images(64)
    noise = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    free, held = trained(x, perturbation=0), trained(x, perturbation=1.0, least=0.1, most=0.3)
    assert free.log_scale.abs().max() == 0, "nothing else may move the scale"
    _, _, plain, perturbed = held(x, noise)
    excess = squared_error(x, perturbed) - squared_error(x, plain)
    _, _, plain, perturbed = free(x, noise)
    assert (squared_error(x, perturbed) - squared_error(x, plain)).abs().max() == 0
    assert 0.05 < float(excess.mean()) < 0.35


def test_compactness_draws_the_latents_to_the_prior():
    x = smooth_images(64)
    far, near = (
        divergence(*trained(x, compactness=weight).encoder(x).chunk(2, 1), 0.5).mean() for weight in (0.0, 0.1)
    )
    assert near < 0.5 * far


def test_the_generator_matches_maps_and_reconstructs_anomalies_badly():
    x, weights = smooth_images(12), torch.tensor([1.0, 0.5, 2.0, 0.5])
    discriminator = seeded(lambda: ConvEncoder(4, 1), 3)

    def loss(adversarial: float, anomalies: int) -> tuple[float, BeatGanDetector]:
        config = BeatGan(kind="beatgan", maps=4, width=8, adversarial=adversarial, anomaly_weight=0.3, batch=16)
        detector = BeatGanDetector(config)
        sets = PixelSets(x[:8], x[8 : 8 + anomalies], weights[:anomalies])
        generator, random = detector._generator, torch.Generator().manual_seed(4)
        found = detector._generator_loss(generator, discriminator, x[:8], generator(x[:8]), 8, sets, random)
        return float(found.detach()), detector

    plain, detector = loss(0.0, 0)
    with torch.no_grad():
        fake = detector._generator(x[:8])
        assert plain == pytest.approx(float(errors(x[:8], fake).mean()), rel=1e-5)
        matching = errors(discriminator.maps(x[:8])[-1], discriminator.maps(fake)[-1]).mean()
        assert loss(2.0, 0)[0] - plain == pytest.approx(2 * float(matching), rel=1e-4)
        odd, of_odd = PixelSets(x[:8], x[8:], weights).draw(16, torch.Generator().manual_seed(4))
        pushed = 0.3 * (of_odd * plain / errors(odd, detector._generator(odd))).mean()
    assert loss(0.0, 4)[0] - plain == pytest.approx(float(pushed), rel=1e-4)

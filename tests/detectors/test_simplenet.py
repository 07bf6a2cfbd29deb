import numpy as np
import pytest
import torch

from kka_ray.config.models import SimpleNet
from kka_ray.detectors.simplenet import SimpleNetDetector
from kka_ray.detectors.simplenet.branch import Branch
from kka_ray.detectors.simplenet.loss import truncated_l1
from kka_ray.features.base import Features


def _branch(noise: float = 1.0) -> tuple[Branch, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator) * torch.linspace(0.1, 3, 12) + 5
    branch = Branch(12, 8, 16)
    branch.start(x, 0.3, noise, 0.5, generator)
    return branch, x


def test_the_loss_is_truncated_at_the_margin():
    outputs = torch.tensor([1.0, 0.5, 0.0, -1.0])
    assert truncated_l1(outputs, 0.5, normal=True).tolist() == [0, 0, 0.5, 1.5]
    assert truncated_l1(outputs, 0.5, normal=False).tolist() == [1.5, 1.0, 0.5, 0]


@pytest.mark.parametrize("anomalies", [7, 0])
def test_the_gradients_are_those_of_the_loss(anomalies):
    branch, x = _branch()
    normals, negatives = branch.standardise(x[:40]), branch.standardise(x[40 : 40 + anomalies] + 2)
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    z = branch.adaptor(normals)
    loss = truncated_l1(branch.discriminate(z), 0.5, normal=True).mean()
    loss = loss + truncated_l1(branch.discriminate(z + noise), 0.5, normal=False).mean()
    against = truncated_l1(branch.discriminate(branch.adaptor(negatives)), 0.5, normal=False)
    (loss + 3 * against.sum() / 7).backward()
    wanted = {name: p.grad.clone() for name, p in branch.named_parameters()}
    branch.set_gradients(normals, noise, negatives, (1 / 40, 3 / 7), 0.5)
    for name, parameter in branch.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_adaptor_starts_as_a_whitening():
    _, x = _branch()
    wide = Branch(12, 12, 16)
    wide.start(x, 1e-4, 1.0, 0.5, torch.Generator().manual_seed(0))
    z = wide.adaptor(wide.standardise(x))
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(12), rtol=0, atol=0.01)


def test_the_start_is_a_falling_function_of_distance():
    branch, x = _branch()
    direction = torch.randn(12, generator=torch.Generator().manual_seed(1))
    steps = torch.stack([x.mean(0) + k * direction for k in range(6)])
    with torch.no_grad():
        values = branch(steps)
        assert (values.diff() < 0).all()
        assert abs(float(branch(x).mean()) - 0.5) < 1e-4


def test_training_changes_every_parameter():
    rng = np.random.default_rng(0)
    features = Features(
        rng.standard_normal((64, 12)).astype(np.float32), rng.standard_normal((64, 3, 3, 6)).astype(np.float16)
    )
    trained = SimpleNetDetector(SimpleNet(epochs=2))
    trained.fit(features, None, features, 0)
    # With a vanishing learning rate the same seed ends where it started.
    start = SimpleNetDetector(SimpleNet(epochs=2, learning_rate=1e-30))
    start.fit(features, None, features, 0)
    before, after = start.state()[0], trained.state()[0]
    assert set(before) == set(after)
    for name in before:
        learned = name.split(".")[1] in ("adaptor", "hidden", "tail")
        assert torch.equal(before[name], after[name]) != learned, name


def test_adaptors_move_at_a_tenth_of_the_rate_and_few_normals_all_the_slower():
    """A first step of Adam moves what has a slope by the rate."""
    rng = np.random.default_rng(0)
    features = Features(
        rng.standard_normal((50, 12)).astype(np.float32), rng.standard_normal((50, 3, 3, 6)).astype(np.float16)
    )
    states = []
    for rate in (1e-30, 0.02):
        detector = SimpleNetDetector(SimpleNet(epochs=1, batch=50, learning_rate=rate))
        detector.fit(features, None, features, 0)
        states.append(detector.state()[0])
    for layer, wanted in (("adaptor", 0.02 / 10), ("hidden", 0.02)):
        for name in (name for name in states[0] if f".{layer}.weight" in name):
            moved = float((states[1][name] - states[0][name]).abs().max())
            assert moved == pytest.approx(wanted * 50 / 1000, rel=0.05), name


def test_the_weight_of_anomalies_raises_the_scores_of_their_like():
    rng = np.random.default_rng(0)
    make = lambda n, at: Features(  # noqa: E731
        (rng.standard_normal((n, 12)) + at * (np.arange(12) == 0)).astype(np.float32),
        (rng.standard_normal((n, 3, 3, 6)) + at * (np.arange(6) == 0)).astype(np.float16),
    )
    normals, validation, anomalies, probe = make(500, 0), make(32, 0), make(16, 1.5), make(32, 1.5)
    means = {}
    for weight in (0.0, 5.0):
        detector = SimpleNetDetector(SimpleNet(epochs=20, anomaly_weight=weight))
        detector.fit(normals, anomalies, validation, 0)
        means[weight] = np.median(detector.score(probe))
    assert means[5.0] > means[0.0] + 0.5


def test_anomalies_that_have_no_weight_change_nothing():
    """Fits with and without anomalies differ by what is learned of them, not by a learning rate or a random number."""
    rng = np.random.default_rng(0)
    make = lambda n: Features(  # noqa: E731
        rng.standard_normal((n, 12)).astype(np.float32), rng.standard_normal((n, 3, 3, 6)).astype(np.float16)
    )
    normals, validation, probe = make(64), make(32), make(32)
    alone, beside = (SimpleNetDetector(SimpleNet(epochs=3, anomaly_weight=0.0)) for _ in range(2))
    alone.fit(normals, None, validation, 0)
    beside.fit(normals, make(16), validation, 0)
    assert np.array_equal(alone.score(probe), beside.score(probe))


def test_a_channel_that_normals_never_use_stays_bounded():
    branch = Branch(4, 4, 8)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0
    branch.start(x, 0.3, 1.0, 0.5, torch.Generator().manual_seed(0))
    probe = torch.zeros(1, 4)
    probe[0, 0] = 1.0
    assert float(((probe - branch.mean) / branch.std).abs().max()) < 40


def test_channels_of_a_kind_are_measured_in_one_unit():
    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.01, 3.0, 100.0, 300.0])
    branch = Branch(5, 5, 8)
    branch.start(x, 0.3, 1.0, 0.5, torch.Generator().manual_seed(0), blocks=(3, 2))
    assert len(branch.std.unique()) == 2
    for part in branch.standardise(x).split([3, 2], dim=1):
        assert float(part.square().mean()) == pytest.approx(1, rel=1e-3)


def test_the_folded_branch_scores_as_the_layers_do():
    branch, x = _branch()
    rows = x.view(20, 15, 12)
    with torch.no_grad():
        torch.testing.assert_close(branch.folded()(rows), branch(rows), rtol=1e-5, atol=1e-5)


def _patchy(count: int, generator: torch.Generator, odd: bool = False) -> Features:
    """Images of 4 x 4 patches; with `odd` each of them has one far patch of its own."""
    patches = torch.randn(count, 4, 4, 64, generator=generator) * 0.1
    if odd:
        patches[:, 0, 0] += torch.randn(count, 64, generator=generator).sign() * 20
    return Features(torch.randn(count, 8, generator=generator).numpy(), patches.half().numpy())


def test_of_an_anomaly_its_most_anomalous_patches_are_learned():
    generator = torch.Generator().manual_seed(0)

    def make(count: int, odd: float = 0.0) -> Features:
        patches = torch.randn(count, 4, 4, 8, generator=generator)
        patches[:, 0, 0, 0] += odd
        return Features(torch.randn(count, 8, generator=generator).numpy(), patches.half().numpy())

    normals, validation, anomalies, probe = make(300), make(30), make(20, 3.0), make(60, 3.0)
    margins = []
    for weight in (0.0, 5.0):
        detector = SimpleNetDetector(SimpleNet(epochs=12, anomaly_weight=weight, anomaly_patches=1))
        detector.fit(normals, anomalies, validation, 0)
        heat = detector.heatmap(probe)
        margins.append(np.median(heat[:, 0, 0]) - np.median(heat[:, 1:, 1:]))
    assert margins[1] > margins[0] + 0.1


def test_patches_do_not_count_where_held_out_normals_have_anomalous_ones():
    generator = torch.Generator().manual_seed(0)
    train, alike, odd = _patchy(60, generator), _patchy(20, generator), _patchy(20, generator, odd=True)
    test = _patchy(30, generator, odd=True)
    trusted, distrusted = SimpleNetDetector(SimpleNet(epochs=2)), SimpleNetDetector(SimpleNet(epochs=2))
    trusted.fit(train, None, alike, 0)
    distrusted.fit(train, None, odd, 0)
    image = SimpleNetDetector(SimpleNet(epochs=2, patch_weight=0))
    image.fit(train, None, odd, 0)
    assert trusted.state()[1]["trust"] > 0.5
    assert distrusted.state()[1]["trust"] == 0
    assert np.array_equal(distrusted.score(test), image.score(test))
    assert not np.allclose(trusted.score(test), image.score(test))
    restored = SimpleNetDetector(SimpleNet(epochs=2)).restore(*trusted.state())
    assert np.array_equal(restored.score(test), trusted.score(test))

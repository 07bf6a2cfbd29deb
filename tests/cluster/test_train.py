from pathlib import Path

import pytest

from kka_ray import assets
from kka_ray.config.models import ClusterConfig, PreferenceConfig
from kka_ray.records import PreferencePair
from kka_ray.store import Store
from tests.cluster import dpo_jobs

MODEL = "builtin:smollm2-135m-instruct"

pytestmark = [
    pytest.mark.skipif(not assets.is_present(MODEL), reason="the built-in models are missing: run `kka setup`"),
    pytest.mark.usefixtures("local_ray"),
]


@pytest.mark.slow
def test_two_dpo_workers_train_as_one_does(tmp_path: Path) -> None:
    """With the same global batch: the same losses, and the same adapter up to rounding."""
    import torch
    from safetensors.torch import load_file

    from kka_ray.preference import dpo

    store = Store(str(tmp_path / "store"))
    pairs = [
        PreferencePair(f"p{i % 2}", f"a{i}", f"b{i}", f"Flowers:\n- {kind}\n-", f" {colour} one\n", f" {colour} car\n")
        for i, colour in enumerate(["a red", "a blue", "a green", "an orange"])
        for kind in [("a rose", "a poppy")[i % 2]]
    ]
    config = PreferenceConfig(steps=3, batch=4, micro_batch=2, warmup=0, learning_rate=1e-3)
    alone = dpo.train_dpo(pairs, MODEL, None, config, 0, tmp_path / "alone", tmp_path / "work", cpu=True)
    cluster = ClusterConfig(train_cpus=0.5, train_threads=1, max_restarts=0)
    shared = config.model_copy(update={"workers": 2})
    output, (ours, theirs) = dpo_jobs.run(store, tmp_path / "reports", pairs, MODEL, shared, cluster)
    for one, two in zip(ours["seen"], theirs["seen"], strict=True):
        assert len(one) == len(two) == 2
        assert len({str(line) for line in one + two}) == 4, "the workers see different pairs, together all of them"
    assert ours["adapter"] == theirs["adapter"], "the workers end with the same adapter"
    one, two = alone.history, output.json("result")["history"]
    first, second = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "alone", output.local / "adapter")
    )
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-3)
    assert one[-1]["loss"] < one[0]["loss"] - 0.02
    scale = max(float(tensor.abs().max()) for tensor in first.values())
    assert all(torch.allclose(first[k], second[k], atol=0.02 * scale) for k in first)

from pathlib import Path

import pytest

from kka_ray import assets
from kka_ray.config.models import ClusterConfig, PreferenceConfig
from kka_ray.records import PreferencePair, to_table
from kka_ray.store import Store, stage_key

MODEL = "builtin:smollm2-135m-instruct"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not assets.is_present(MODEL), reason="the built-in models are missing: run `kka setup`"),
]


def test_two_dpo_workers_train_as_one_does(tmp_path: Path) -> None:
    """With the same global batch: the same losses, and the same adapter up to rounding."""
    import torch
    from safetensors.torch import load_file

    from kka_ray.cluster import train
    from kka_ray.cluster.session import session
    from kka_ray.preference import dpo

    store = Store(str(tmp_path / "store"))
    pairs = [
        PreferencePair(f"p{i % 2}", f"a{i}", f"b{i}", f"Flowers:\n- {kind}\n-", f" {colour} one\n", f" {colour} car\n")
        for i, colour in enumerate(["a red", "a blue", "a green", "an orange"])
        for kind in [("a rose", "a poppy")[i % 2]]
    ]
    table = to_table(PreferencePair, pairs)
    pairs_key = store.get_or_make("pairs", 1, {"pairs": "four"}, lambda attempt: attempt.table(table)).key
    config = PreferenceConfig(steps=3, batch=4, micro_batch=2, warmup=0, learning_rate=1e-3)
    cluster = ClusterConfig(train_cpus=0.5, train_threads=1, max_restarts=0)
    results = {}
    with session(ClusterConfig()):
        for workers in (1, 2):
            inputs = {"workers": workers}
            arguments = {
                "store": store.uri,
                "pairs": pairs_key,
                "previous": None,
                "model": MODEL,
                "config": config,
                "seed": 0,
                "inputs": inputs,
                "trust_remote_code": False,
                "cluster": cluster,
            }
            train.run("dpo", train.dpo_worker, arguments, workers, cluster)
            output = store.find("dpo", stage_key("dpo", dpo.VERSION, inputs))
            assert output is not None
            weights = load_file(output.local / "adapter" / "adapter_model.safetensors")
            results[workers] = (output.json("result")["history"], weights)
    (one, first), (two, second) = results[1], results[2]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-3)
    assert one[-1]["loss"] < one[0]["loss"] - 0.02
    scale = max(float(tensor.abs().max()) for tensor in first.values())
    assert all(torch.allclose(first[k], second[k], atol=0.02 * scale) for k in first)

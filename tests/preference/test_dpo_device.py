from pathlib import Path

import pytest
import torch

from kka_ray.config.models import PreferenceConfig
from kka_ray.errors import ConfigError
from kka_ray.preference import dpo


def test_the_caller_says_what_is_computed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may see GPUs that it was not given."""
    arguments = dpo._arguments(PreferenceConfig(), 0, tmp_path, 1, cpu=False)
    assert not arguments.use_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = dpo._arguments(PreferenceConfig(), 0, tmp_path, 1, cpu=True)
    assert arguments.use_cpu
    assert arguments.device == torch.device("cpu")


def test_a_model_is_sharded_where_the_configuration_says_so_and_never_on_a_cpu(tmp_path: Path) -> None:
    whole = PreferenceConfig(workers=2)
    assert dpo._arguments(whole, 0, tmp_path, 2, cpu=False).fsdp_plugin_args is None
    sharded = PreferenceConfig(workers=2, sharding="fsdp")
    made = dpo._arguments(sharded, 0, tmp_path, 2, cpu=False).fsdp_plugin_args
    assert (made["fsdp_version"], made["reshard_after_forward"]) == (2, True)
    assert made["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    with pytest.raises(ConfigError, match=r"preference\.sharding: fsdp needs GPUs"):
        dpo.train_dpo([], "no-such-model", None, sharded, 0, tmp_path, tmp_path, cpu=True, workers=2)

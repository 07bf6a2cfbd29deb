from pathlib import Path

import pytest
import torch

from kka_ray.config.models import PreferenceConfig
from kka_ray.preference import dpo


def test_the_caller_says_what_is_computed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may see GPUs that it was not given."""
    arguments = dpo._arguments(PreferenceConfig(), 0, tmp_path, 1, cpu=False)
    assert not arguments.use_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = dpo._arguments(PreferenceConfig(), 0, tmp_path, 1, cpu=True)
    assert arguments.use_cpu
    assert arguments.device == torch.device("cpu")

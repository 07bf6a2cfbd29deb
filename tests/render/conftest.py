from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.render import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fake_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in pipeline encodes text without MiniLM's weights."""
    monkeypatch.setattr("kka_ray.features.text.TextEncoder", tiny.FakeTextEncoder)


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="session")
def stable_diffusion_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion_3(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="session")
def flow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "pipeline"
    tiny.flow_pipeline().save_pretrained(folder)
    return folder

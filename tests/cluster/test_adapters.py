"""What a sampler does when an adapter cannot be loaded whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kka_ray.cluster.workers import SamplerWorker
from kka_ray.config.models import DescribeConfig
from kka_ray.store import Store


class _Engine:
    """Fails at the first adapter that it is given; remembers all."""

    def __init__(self) -> None:
        self.given: list[Path | None] = []

    def load_adapter(self, folder: Path | None) -> None:
        self.given.append(folder)
        if len(self.given) == 1:
            raise MemoryError("no room")


def test_after_half_an_adapter_the_base_model_is_loaded_anew(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    key = store.get_or_make("dpo", 1, {}, lambda a: a.write("adapter/adapter_config.json", b"{}")).key
    worker = SamplerWorker(store.uri, DescribeConfig(), 1, "cpu")
    engine = _Engine()
    worker.engine = engine  # type: ignore[assignment]
    worker._use(None)
    assert engine.given == [], "the base model is there from the start"
    with pytest.raises(MemoryError):
        worker._use(key)
    worker._use(None)
    assert engine.given[1] is None
    assert worker.adapter is None

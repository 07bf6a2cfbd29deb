"""Places are had as a whole or given up."""

from __future__ import annotations

from typing import Any

import pytest

from kka_ray.cluster import placement
from kka_ray.config.models import ClusterConfig, PoolConfig


class Group:
    """A placement group at which Ctrl-C is pressed as it is waited for."""

    def ready(self) -> Any:
        raise KeyboardInterrupt


def test_places_are_given_up_where_the_wait_for_them_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up: list[Any] = []
    monkeypatch.setattr(placement, "placement_group", lambda *_, **__: Group())
    monkeypatch.setattr(placement, "remove_placement_group", given_up.append)
    monkeypatch.setattr(placement, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(placement, "nodes", lambda: [{}, {}])
    size = PoolConfig(gpus=1)
    with pytest.raises(KeyboardInterrupt):
        placement.reserve("samplers", size, ClusterConfig())
    with pytest.raises(KeyboardInterrupt):
        placement.Kept("DPO workers", size, ClusterConfig()).open()
    assert len(given_up) == 2

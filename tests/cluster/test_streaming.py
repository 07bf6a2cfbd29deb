"""What a streamer does with its pools."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kka_ray.cluster.streaming import Streamer


class _Pool:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.stopped = error, 0

    def stop(self) -> None:
        self.stopped += 1
        if self.error:
            raise self.error


def test_every_pool_is_stopped_even_if_another_cannot_be() -> None:
    pools = _Pool(ConnectionError("the cluster is gone")), _Pool()
    with pytest.raises(ConnectionError, match="the cluster is gone"):
        Streamer.close(SimpleNamespace(_samplers=pools[0], _renderers=pools[1]))  # type: ignore[arg-type]
    assert [pool.stopped for pool in pools] == [1, 1]

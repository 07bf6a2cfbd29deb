"""A local Ray for the tests of this folder, started once a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kka_ray.cluster.session import session
from kka_ray.config.models import ClusterConfig


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with session(ClusterConfig()):
        yield

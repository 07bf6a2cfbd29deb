"""A vLLM engine in a process of its own: one process holds one engine, and gives its memory back only as it ends."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from kka_ray.config.models import DescribeConfig

_engine: Any = None


class EngineProcess:
    """Calls the methods of the engine by their names."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._pool.submit(_call, name, arguments).result(timeout=300)

    def listening(self) -> list[tuple[str, int]]:
        """Addresses and ports that the process listens at."""
        return self._pool.submit(_listening).result(timeout=60)


@contextmanager
def engine_process(config: DescribeConfig) -> Iterator[EngineProcess]:
    """An engine for as long as the block lasts."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(config,)) as pool:
        yield EngineProcess(pool)


def _start(config: DescribeConfig) -> None:
    import torch

    from kka_ray.describe.sampler import build_sampler

    torch.set_num_threads(2)
    global _engine
    _engine = build_sampler(config)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_engine, name)(*arguments)


def _listening() -> list[tuple[str, int]]:
    import psutil

    return [(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]

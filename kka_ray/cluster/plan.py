"""Who gets which CPUs and GPUs, checked against the cluster before anything starts.

An actor pool whose actors cannot all be placed would wait for ever without a word, so nothing is started before the
plan fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kka_ray.config.models import RunConfig
from kka_ray.errors import ResourceError


@dataclass(frozen=True)
class Share:
    """What one group of processes asks for; `cpus` and `gpus` are a process's."""

    name: str
    processes: int
    cpus: float
    gpus: float
    threads: int

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        each = f"{self.cpus:g} CPU{gpus}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.name}: {self.processes} x ({each})"


@dataclass(frozen=True)
class Plan:
    """The shares of a run. The pools stay while Ray Train jobs come and go, so all of them must fit at once."""

    shares: tuple[Share, ...]

    @property
    def cpus(self) -> float:
        """Logical CPUs that the run asks for at its widest."""
        return sum(s.processes * s.cpus for s in self.shares)

    @property
    def gpus(self) -> float:
        """GPUs that the run asks for at its widest."""
        return sum(s.processes * s.gpus for s in self.shares)

    def check(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Places every process on the nodes, largest first. Raises ResourceError naming what does not fit.

        `nodes` are the resources of each node, with the keys `CPU` and `GPU`.
        """
        free = [{"CPU": n.get("CPU", 0.0), "GPU": n.get("GPU", 0.0)} for n in nodes]
        for share in sorted(self.shares, key=lambda s: (s.gpus, s.cpus), reverse=True):
            for _ in range(share.processes):
                node = next((n for n in free if _fits(share, n)), None)
                if node is None:
                    raise ResourceError(self._missing(share, nodes))
                node["CPU"] -= share.cpus
                node["GPU"] -= share.gpus

    def _missing(self, share: Share, nodes: Sequence[Mapping[str, float]]) -> str:
        cpus = sum(n.get("CPU", 0.0) for n in nodes)
        gpus = sum(n.get("GPU", 0.0) for n in nodes)
        return (
            f"the run does not fit the cluster: no room for {share}.\n"
            f"It asks for {self.cpus:g} CPU and {self.gpus:g} GPU in all; the cluster has {cpus:g} CPU and {gpus:g} "
            f"GPU on {len(nodes)} node{'s' if len(nodes) != 1 else ''}.\n"
            "Lower cluster.samplers / cluster.renderers (workers, cpus, gpus), cluster.train_cpus / train_gpus or the "
            "numbers of workers, or join a larger cluster (cluster.address)"
        )

    def __str__(self) -> str:
        lines = [str(s) for s in self.shares]
        return "\n".join([*lines, f"in all: {self.cpus:g} CPU, {self.gpus:g} GPU"])


def make_plan(config: RunConfig) -> Plan:
    """The shares that a configuration asks for."""
    cluster = config.cluster
    train = max(config.preference.workers if config.loop.rounds else 1, config.detect.workers)
    return Plan(
        (
            _pool("samplers", cluster.samplers),
            _pool("renderers", cluster.renderers),
            Share("train workers", train, cluster.train_cpus, cluster.train_gpus, cluster.train_threads),
        )
    )


def _pool(name: str, pool: object) -> Share:
    from kka_ray.config.models import PoolConfig

    assert isinstance(pool, PoolConfig)
    return Share(name, pool.workers, pool.cpus, pool.gpus, pool.threads)


def _fits(share: Share, node: Mapping[str, float]) -> bool:
    slack = 1e-6
    return share.cpus <= node["CPU"] + slack and share.gpus <= node["GPU"] + slack

"""Who gets which CPUs and GPUs on which node, checked against the cluster before anything starts.

An actor pool whose actors cannot all be placed would wait for ever without a word, so nothing is started before the
plan fits. A run has phases; what belongs to one phase must fit at once.

- `cluster.mode: disjoint`: samplers, renderers and the DPO job have places of their own and stay while a round lasts.
  Fractions of a GPU share it: 0.4 for a sampler, 0.3 for a renderer and 0.3 for training fit one.
- `colocated`: they take turns. The engines of one end before the next starts: an engine that sleeps keeps its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kka_ray import assets
from kka_ray.amounts import amount
from kka_ray.config.models import PoolConfig, RunConfig
from kka_ray.config.sweep import Sweep
from kka_ray.errors import AssetError, ResourceError

TRIAL_CPUS = 0.25
"""Logical CPUs of a trial's own process; what it waits for most of the time computes elsewhere."""

_SLACK = 1e-6
_REMEDY = (
    "Lower cluster.samplers / cluster.renderers (workers, cpus, gpus), cluster.train_cpus / train_gpus or the "
    "numbers of workers; let stages take turns (cluster.mode=colocated); or join a larger cluster "
    "(cluster.address)"
)


@dataclass(frozen=True)
class Share:
    """What one group of processes asks for; `cpus`, `gpus` and `weights` are a process's."""

    name: str
    processes: int
    cpus: float
    gpus: float
    threads: int
    engine: str = ""
    """What they run, in words."""
    weights: int | None = None
    """Bytes of the model's weights on disk; None where the model is not on this machine yet."""
    most: int = 0
    """Processes while much waits and there is room; no place is kept for those beyond `processes`."""

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        each = f"{self.cpus:g} CPU{gpus}, {amount(self.threads, 'thread')}"
        more = f", up to {self.most} where there is room" if self.most > self.processes else ""
        return f"{self.name}: {self.processes} x ({each}){more}"


@dataclass(frozen=True)
class Phase:
    """Shares that are needed at the same time."""

    name: str
    shares: tuple[Share, ...]

    @property
    def cpus(self) -> float:
        """Logical CPUs in all."""
        return sum(s.processes * s.cpus for s in self.shares)

    @property
    def gpus(self) -> float:
        """GPUs in all."""
        return sum(s.processes * s.gpus for s in self.shares)


@dataclass
class _Node:
    name: str
    cpus: float
    gpus: list[float]
    """What is left of each GPU."""
    memory: float
    """Bytes left; infinite where the node does not say."""
    taken: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, number: int, resources: Mapping[str, float]) -> _Node:
        names = [k.removeprefix("node:") for k in resources if k.startswith("node:") and "__" not in k]
        whole = [1.0] * int(resources.get("GPU", 0.0))
        memory = resources.get("memory", float("inf"))
        return cls(names[0] if names else f"node {number}", resources.get("CPU", 0.0), whole, memory)

    def take(self, share: Share) -> bool:
        """Places a process here if there is room. Part of a GPU is part of one GPU."""
        memory = share.weights or 0 if not share.gpus else 0  # a GPU's memory is not known before it is used
        if share.cpus > self.cpus + _SLACK or memory > self.memory:
            return False
        if 0 < share.gpus < 1:
            # The fullest that suffices, so that whole ones stay whole.
            fitting = [i for i, left in enumerate(self.gpus) if left + _SLACK >= share.gpus]
            if not fitting:
                return False
            self.gpus[min(fitting, key=self.gpus.__getitem__)] -= share.gpus
        elif share.gpus:
            whole = [i for i, left in enumerate(self.gpus) if left > 1 - _SLACK][: int(share.gpus)]
            if len(whole) < share.gpus:
                return False
            for i in whole:
                self.gpus[i] = 0.0
        self.cpus -= share.cpus
        self.memory -= memory
        self.taken[share.name] += 1
        return True


@dataclass(frozen=True)
class Plan:
    """The phases of a run, or of what else `name` says."""

    phases: tuple[Phase, ...]
    name: str = "the run"
    remedy: str = _REMEDY
    """What to do where it does not fit: the settings that it was made of."""

    def check(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Raises ResourceError naming what does not fit. `nodes` are the resources of each node (`CPU`, `GPU`, ...)."""
        self.place(nodes)

    def place(self, nodes: Sequence[Mapping[str, float]]) -> dict[tuple[str, str], dict[str, int]]:
        """Processes by node for each (phase, share), the largest placed first. Raises ResourceError if one has no room.

        Ray chooses the nodes itself when the processes start; this shows that there is a way.
        """
        places: dict[tuple[str, str], dict[str, int]] = {}
        for phase in self.phases:
            free = [_Node.of(i, resources) for i, resources in enumerate(nodes)]
            for share in sorted(phase.shares, key=lambda s: (s.gpus, s.cpus), reverse=True):
                for _ in range(share.processes):
                    if not any(node.take(share) for node in free):
                        raise ResourceError(self._missing(phase, share, nodes))
                places[phase.name, share.name] = {n.name: n.taken[share.name] for n in free if n.taken[share.name]}
        return places

    def __str__(self) -> str:
        lines = []
        for phase in self.phases:
            lines.append(f"{phase.name}: {phase.cpus:g} CPU, {phase.gpus:g} GPU")
            lines += [f"  {share}" for share in phase.shares]
        return "\n".join(lines)

    def _missing(self, phase: Phase, share: Share, nodes: Sequence[Mapping[str, float]]) -> str:
        there = ", ".join(
            f"{n.name}: {n.cpus:g} CPU, {len(n.gpus)} GPU" + (f", {n.memory / 1e9:.1f} GB" if n.memory < 1e18 else "")
            for n in (_Node.of(i, resources) for i, resources in enumerate(nodes))
        )
        weights = f" and {share.weights / 1e9:.1f} GB of memory a process for its weights" if share.weights else ""
        return (
            f"{self.name} does not fit the cluster: no room for {share}{weights} in the phase {phase.name!r}.\n"
            f"The phase asks for {phase.cpus:g} CPU and {phase.gpus:g} GPU at once; the cluster has "
            f"{there or 'no node'}.\n{self.remedy}"
        )


def make_plan(config: RunConfig) -> Plan:
    """The phases that a configuration asks for."""
    cluster = config.cluster
    model = config.describe.sampler.model
    samplers = _pool("samplers", cluster.samplers, f"{config.describe.sampler.kind}: {model}", model)
    renderers = _pool("renderers", cluster.renderers, f"diffusers: {config.render.pipeline}", config.render.pipeline)
    generating = [Phase("describe and render", (samplers, renderers))]
    if cluster.mode == "colocated":
        generating = [Phase("describe", (samplers,)), Phase("render", (renderers,))]
    if config.loop.rounds:
        dpo = _train(config, "DPO workers", config.preference.workers, f"TRL: {model}", model)
        if cluster.mode == "colocated":
            generating.append(Phase("prefer", (dpo,)))
        else:
            generating = [Phase("describe, render and prefer", (samplers, renderers, dpo))]
    kinds = ", ".join(d.kind for d in config.detect.detectors)
    detect = _train(config, "detector workers", config.detect.workers, kinds, config.backbone.model, gpus=False)
    return Plan((*generating, Phase("detect", (detect,))))


def plan_of_sweep(sweep: Sweep) -> Plan:
    """The phases of all trials, each that differs once: what varies may ask for other places."""
    plans = [plan_of_trials(trial.config, sweep.config.concurrency) for trial in sweep.trials]
    return Plan(tuple(dict.fromkeys(phase for plan in plans for phase in plan.phases)))


def plan_of_trials(config: RunConfig, concurrency: int) -> Plan:
    """The phases of trials that run at the same time, in step. A trial holds its pools' places from first to last."""
    plan = make_plan(config)
    pools = {s.name: s for phase in plan.phases for s in phase.shares if s.name in ("samplers", "renderers")}
    held = [Share("trials", 1, TRIAL_CPUS, 0, 1), *pools.values()]
    trains = {s for phase in plan.phases for s in phase.shares if s.name not in pools}
    return Plan(
        tuple(
            Phase(
                f"{amount(concurrency, 'trial')}, {train.name}",
                tuple(replace(s, processes=s.processes * concurrency, most=0) for s in (*held, train)),
            )
            for train in sorted(trains, key=lambda s: s.name)
        )
    )


def _pool(name: str, pool: PoolConfig, engine: str, model: str) -> Share:
    most = pool.max_workers or pool.workers
    return Share(name, pool.workers, pool.cpus, pool.gpus, pool.threads, engine, weights_bytes(model), most)


def _train(config: RunConfig, name: str, workers: int, engine: str, model: str, *, gpus: bool = True) -> Share:
    cluster = config.cluster
    each = cluster.train_gpus if gpus else 0.0
    return Share(name, workers, cluster.train_cpus, each, cluster.train_threads, engine, weights_bytes(model))


def weights_bytes(reference: str) -> int | None:
    """Bytes of the safetensors that a model is loaded from; None if it is not on this machine, or not whole.

    Raises AssetError if there is no such built-in model, or the index in a model's folder names a file that is not
    there.
    """
    assets.check_name(reference)
    folder = assets.here(reference)
    if folder is None:
        return None
    try:
        files = assets.weights(folder)
    except AssetError:
        if reference.startswith("hub:"):
            return None  # the cache holds a part of it; what is missing is fetched as the model is loaded
        raise
    return sum(file.stat().st_size for file in files or folder.rglob("*.safetensors"))

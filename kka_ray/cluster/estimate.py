"""A rough time for a run, from what the same stages took before: the markers of the store's outputs say it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kka_ray.amounts import amount
from kka_ray.cluster.streaming import render_config, sample_config, sampler_config
from kka_ray.config.models import RunConfig
from kka_ray.store import Output, Store

_ENOUGH = 50  # outputs of a stage that are looked at


@dataclass(frozen=True)
class Estimate:
    """Seconds of a stage over a whole run; None where the store holds nothing like it."""

    stage: str
    work: str
    """What there is to do, in words."""
    seconds: float | None


def estimate(config: RunConfig, store: Store) -> list[Estimate]:
    """Each stage's time if nothing is found in the store: work of all processes over their number."""
    rounds, cluster = config.loop.rounds + 1, config.cluster
    lines = config.loop.lines * rounds
    images = lines + config.render.normals
    line = _mean(
        output.seconds / max(sum(row[2] for row in output.marker["inputs"]["prompts"]), 1)
        for output in _like(
            store,
            "sample",
            {
                "config": sample_config(config),
                "sampler": sampler_config(config),
                "threads": cluster.samplers.threads,
            },
        )
    )
    image = _mean(
        output.seconds / max(len(output.marker["inputs"]["rows"]), 1)
        for output in _like(store, "render", {"config": render_config(config), "threads": cluster.renderers.threads})
    )
    training = {"config": config.preference.training(), "threads": cluster.train_threads}
    dpo = _mean(output.seconds for output in _like(store, "dpo", training))
    fits = [
        _mean(o.seconds for o in _like(store, "fit", {"detector": d.model_dump(mode="json")}))
        for d in config.detect.detectors
    ]
    # Most detectors are fitted with every anomaly set: none, the zero-th, the last, and the controls.
    arms = (3 + len(config.detect.controls)) * config.detect.seeds
    fit = None if None in fits else arms * sum(f for f in fits if f is not None)
    return [
        Estimate("describe", amount(lines, "line"), _times(line, lines / cluster.samplers.workers)),
        Estimate("render", f"at most {amount(images, 'image')}", _times(image, images / cluster.renderers.workers)),
        Estimate("prefer", amount(config.loop.rounds, "DPO job"), _times(dpo, config.loop.rounds)),
        Estimate("detect", f"at most {amount(arms * len(fits), 'fit')}", _times(fit, 1 / config.detect.workers)),
    ]


def total(estimates: Iterable[Estimate], *, turns: bool) -> float | None:
    """Seconds of all stages: describing and rendering overlap unless they take turns. None if any is not known."""
    of = {e.stage: e.seconds for e in estimates}
    if any(seconds is None for seconds in of.values()):
        return None
    known = {stage: seconds or 0.0 for stage, seconds in of.items()}
    together = sum if turns else max
    return together([known.pop("describe"), known.pop("render")]) + sum(known.values())


def _like(store: Store, stage: str, inputs: dict[str, Any]) -> list[Output]:
    """Some outputs of a stage whose inputs have these values."""
    found: list[Output] = []
    for name, key in store.names():
        if name != stage or len(found) == _ENOUGH:
            continue
        output = store.find(name, key)
        if output and all(output.marker["inputs"].get(k) == v for k, v in inputs.items()):
            found.append(output)
    return found


def _mean(values: Iterable[float]) -> float | None:
    rows = list(values)
    return fmean(rows) if rows else None


def _times(value: float | None, count: float) -> float | None:
    return None if value is None else value * count

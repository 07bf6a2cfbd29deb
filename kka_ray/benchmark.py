"""The demo's figures over several seeds of the whole loop, against what the demo is meant to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from kka_ray import assets
from kka_ray.amounts import amount
from kka_ray.cluster.streaming import Progress
from kka_ray.config import config_hash
from kka_ray.config.models import RunConfig
from kka_ray.detectors import tuned
from kka_ray.errors import ConfigError
from kka_ray.evaluation import VIEWED, spread, takes
from kka_ray.experiment import run
from kka_ray.files import write_json

Read = Callable[[dict[str, Any]], float]

_ROUNDING = 1e-9
_CONTROLS = ("noise", "cutpaste")
"""Sets without a language model that KKA's is held against."""
_NEEDED = (*_CONTROLS, VIEWED)
_OF_HEADLINE = "a detect.headline that learns from anomalies and can do without them, as simplenet (it is {})"


class _Missing(Exception):
    """A run has not what a check reads: without kept images no detector is fitted to any."""


@dataclass(frozen=True)
class Check:
    """A measure of a run's summary, and the range that its mean over the seeds should lie in.

    The edges are in the range, but for the lower one of a strict check.
    """

    name: str
    read: Read
    low: float = -np.inf
    high: float = np.inf
    strict: bool = False

    def measure(self, summary: dict[str, Any]) -> float | None:
        """The measure in a run's summary, None where the run has nothing to measure."""
        try:
            return self.read(summary)
        except _Missing:
            return None

    @property
    def wanted(self) -> str:
        """The range in words."""
        bounds = ((">" if self.strict else "≥", self.low), ("≤", self.high))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if np.isfinite(bound))

    def passes(self, mean: float) -> bool:
        """Whether a mean lies in the range, but for what rounding does to it."""
        least = self.low + _ROUNDING if self.strict else self.low - _ROUNDING
        return least <= mean <= self.high + _ROUNDING


def demo(
    config: RunConfig, seeds: int, target: Path, progress: Progress, say: Callable[[str], None], *, verbose: bool
) -> dict[str, Any]:
    """Runs the configuration once a seed, as NAME-seed-K, and writes the figures to `target` as JSON; returns them.

    Runs that are finished are read from the store. A seed changes everything: the normals, their split, what is
    written and drawn, and the detectors. Raises ConfigError for a configuration that lacks what the checks look at.
    """
    _check(config)
    summaries = []
    for seed in range(seeds):
        say(f"seed {seed + 1} of {seeds}")
        named = config.model_copy(update={"name": f"{config.name}-seed-{seed}", "seed": seed})
        summaries.append(run(named, progress, say, verbose=verbose).summary)
    result = collect(summaries)
    result["config_hash"] = config_hash(config)
    result["made_with"] = made_with(config.render.pipeline)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, result)
    return result


def made_with(pipeline: str) -> dict[str, Any]:
    """What a measurement depends on beside its configuration: the renderer's weights and the detectors' version."""
    return {"renderer": assets.resolve(pipeline).identity, "detectors": tuned.VERSION}


def _check(config: RunConfig) -> None:
    """Before the first run, which takes long."""
    detect = config.detect
    lacking = [
        *([] if config.data.kind == "flowers" else ["data.kind: flowers, whose truth is known"]),
        *([] if any(d.kind == "knn" for d in detect.detectors) else ["knn among detect.detectors"]),
        *(f"{control} among detect.controls" for control in _NEEDED if control not in detect.controls),
        *([] if _fits_all(config) else [_OF_HEADLINE.format(detect.headline)]),
    ]
    if lacking:
        raise ConfigError(f"the demo's checks cannot be made without {'; '.join(lacking)}")


def _fits_all(config: RunConfig) -> bool:
    """Whether the headline detector has every arm: it can be fitted to normals alone, and heeds anomalies."""
    (headline,) = (d for d in config.detect.detectors if d.kind == config.detect.headline)
    return takes(headline, False) and takes(headline, True)


def collect(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Every check's mean and spread over the summaries of runs that differ in their seed, and each seed's figures.

    What a seed has not is None among the figures, and left out of the mean; a check passes only if every seed has it.
    """
    checks = {}
    for check in CHECKS:
        values = _spread([check.measure(s) for s in summaries])
        bounds = {k: v for k, v in (("low", check.low), ("high", check.high)) if np.isfinite(v)}
        passed = None not in values["per_seed"] and check.passes(values["mean"])
        checks[check.name] = values | bounds | {"wanted": check.wanted, "passed": passed}
    auc = {kind: _arms([s["detectors"][kind] for s in summaries]) for kind in summaries[0]["detectors"]}
    keep = (
        "described_fraction",
        "drawn_fraction",
        "generated_fraction",
        "rounds",
        "truth",
        "text_signal",
        "wall_seconds",
    )
    return {
        "seeds": len(summaries),
        "versions": summaries[0]["versions"],
        "checks": checks,
        "auc": auc,
        "runs": [{k: s[k] for k in keep if k in s} for s in summaries],
    }


def _arms(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a detector's arms in each run the mean and spread over the runs."""
    arms = dict.fromkeys(arm for row in rows for arm in row)
    return {arm: _spread([row[arm]["mean"] if arm in row else None for row in rows]) for arm in arms}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """As `evaluation.spread` of the values that are there; mean and deviation are None where none is."""
    there = [v for v in values if v is not None]
    return (spread(there) if there else {"mean": None, "std": None}) | {"per_seed": list(values)}


def table(result: dict[str, Any]) -> Table:
    """The checks, one a row."""
    out = Table(title=f"the demo over {amount(result['seeds'], 'seed')}")
    for name in ("measure", "mean ± std", "wanted", ""):
        out.add_column(name, justify="left" if name == "measure" else "right")
    for name, row in result["checks"].items():
        out.add_row(name, in_words(row), row["wanted"], "yes" if row["passed"] else "no")
    return out


def in_words(row: Mapping[str, Any]) -> str:
    """Mean and spread of a row, and of how many seeds they are where some have no figure."""
    values = row["per_seed"]
    if row["mean"] is None:
        return "not measured"
    missing = f" in {len(values) - values.count(None)} of {amount(len(values), 'seed')}" if None in values else ""
    return f"{row['mean']:.4f} ± {row['std']:.4f}{missing}"


def _auc(summary: dict[str, Any], arm: str, kind: str | None = None) -> float:
    arms = summary["detectors"][kind or summary["detector"]]
    if arm not in arms:
        raise _Missing
    return float(arms[arm]["mean"])


def _kept_normal(summary: dict[str, Any]) -> float:
    if not summary["generated_fraction"]:
        raise _Missing  # the share of no image is 0, which would pass
    return float(summary["truth"]["kept_normal_share"])


def _spearman(summary: dict[str, Any]) -> float:
    if not summary["truth"]:
        raise _Missing
    return float(summary["truth"]["spearman"] or 0.0)


def _best_without(summary: dict[str, Any]) -> float:
    """The better of the headline detector and k-NN without anomalies."""
    return max(_auc(summary, "baseline"), _auc(summary, "baseline", "knn"))


def _control(summary: dict[str, Any]) -> float:
    return max(_auc(summary, control) for control in _CONTROLS)


CHECKS = (
    Check("headline baseline minus k-NN", lambda s: _auc(s, "baseline") - _auc(s, "baseline", "knn"), low=-0.03),
    Check("better of the two without anomalies", _best_without, high=0.93),
    Check("zero-th minus baseline", lambda s: _auc(s, "zeroth") - _auc(s, "baseline"), low=0, strict=True),
    Check("KKA minus zero-th", lambda s: _auc(s, "kka") - _auc(s, "zeroth"), low=0, strict=True),
    Check("KKA minus the better without anomalies", lambda s: _auc(s, "kka") - _best_without(s), low=0.05),
    Check("KKA minus the better of noise and CutPaste", lambda s: _auc(s, "kka") - _control(s), low=0, strict=True),
    Check("KKA minus normals and their views", lambda s: _auc(s, "kka") - _auc(s, VIEWED), low=0, strict=True),
    Check("kept share of the normals", lambda s: s["generated_fraction"], high=0.05),
    Check("hard rate in round 0", lambda s: s["rounds"][0]["hard_rate"], low=0.15, high=0.4),
    Check(
        "hard rate of the last round over that of round 0",
        lambda s: s["rounds"][-1]["hard_rate"] / max(s["rounds"][0]["hard_rate"], 1e-9),
        low=1.5,
    ),
    Check(
        "diversity of the last round over that of round 0",
        lambda s: s["rounds"][-1]["diversity"] / max(s["rounds"][0]["diversity"], 1e-9),
        low=0.8,
    ),
    Check("truly normal among the kept", _kept_normal, high=0.05),
    Check("Spearman of hardness with true distance", _spearman, low=0.5),
)
"""What the demo is meant to show."""

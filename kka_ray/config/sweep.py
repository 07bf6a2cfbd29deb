"""What a sweep is: a run configuration, the parameters that vary, and the trials that follow from both.

The trials are worked out and checked before anything starts, so a sweep does not fail in its last hour over a value
that its first second could have refused.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from kka_ray.config.loading import config_hash, load, merge, parse, read
from kka_ray.config.models import IGNORE_ANOMALIES, ClusterConfig, RunConfig, Strict
from kka_ray.config.strict import NAME
from kka_ray.errors import ConfigError

_FIXED = {
    "name": "each trial has a name of its own",
    "seed": "another seed splits the normals anew, and trials on other validation normals cannot be compared",
    "data": "trials on other normal images cannot be compared",
    "cluster": "where a run computes is no parameter of the method; set it in the run configuration",
    "tracking": "all trials are tracked together",
    "store": "trials share what they have in common through one store",
    "output": "the sweep has one folder",
}


class Grid(Strict):
    """Every one of these values, with every one of the other grids."""

    grid: tuple[JsonValue, ...] = Field(min_length=1)


class Choice(Strict):
    """One of these values at random."""

    choice: tuple[JsonValue, ...] = Field(min_length=1)


class Uniform(Strict):
    """A number at random between two, each as likely as the other."""

    uniform: tuple[float, float]

    @field_validator("uniform")
    @classmethod
    def _has_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _increasing(value)


class LogUniform(Strict):
    """A number at random between two positive ones, its logarithm uniform."""

    loguniform: tuple[float, float]

    @field_validator("loguniform")
    @classmethod
    def _has_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] <= 0:
            raise ValueError(f"a loguniform range begins above 0, got {value[0]}")
        return _increasing(value)


_KINDS = ("grid", "choice", "uniform", "loguniform")


def _kind(value: Any) -> str | None:
    keys = value if isinstance(value, Mapping) else type(value).model_fields if isinstance(value, Strict) else ()
    found = [k for k in _KINDS if k in keys]
    return found[0] if len(found) == 1 else None


Parameter = Annotated[
    Annotated[Grid, Tag("grid")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("loguniform")],
    Discriminator(
        _kind,
        custom_error_type="parameter_kind",
        custom_error_message="a parameter has exactly one of the keys grid, choice, uniform and loguniform",
    ),
]


class SweepConfig(Strict):
    """A sweep over run configurations."""

    name: str = Field(pattern=NAME, description="names the sweep's folder")
    run: str | dict[str, JsonValue] = Field(
        description="a run configuration: a file relative to this one, or its values, which may begin with `extends:`"
    )
    parameters: dict[str, Parameter] = Field(min_length=1, description="by dotted name, as in loop.rounds")
    trials: int | None = Field(None, ge=1, description="random draws for each point of the grid")
    concurrency: int = Field(1, ge=1, description="trials that run at the same time")
    seed: int = Field(0, ge=0, description="of the random draws; the runs keep their own")
    objective: Literal["validation_auc"] = "validation_auc"
    champion_evaluation: bool = Field(True, description="evaluate the best configuration on the test images, once")

    @field_validator("parameters")
    @classmethod
    def _names_are_there(cls, value: dict[str, Parameter]) -> dict[str, Parameter]:
        known = set(dotted_names(RunConfig))
        for name in value:
            if name not in known:
                near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name!r} is not in a run configuration{hint}")
            reason = _FIXED.get(name.split(".")[0])
            if reason:
                raise ValueError(f"{name!r} cannot vary within a sweep: {reason}")
        return value

    @model_validator(mode="after")
    def _trials_fit_the_parameters(self) -> SweepConfig:
        draws = [name for name, p in self.parameters.items() if not isinstance(p, Grid)]
        if draws and self.trials is None:
            raise ValueError(f"{draws[0]!r} is drawn at random; say how often with `trials`")
        if not draws and self.trials is not None:
            raise ValueError("`trials` counts random draws, and every parameter is a grid; leave it out")
        return self


@dataclass(frozen=True)
class Trial:
    """One point: its number from 0, the values by dotted name, and the run configuration that they make."""

    number: int
    overrides: dict[str, JsonValue]
    config: RunConfig

    @property
    def label(self) -> str:
        """Its number and parameters, in one line."""
        return f"trial {self.number} ({', '.join(f'{k}={short(v)}' for k, v in self.overrides.items())})"


def short(value: Any) -> str:
    """A parameter's value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Sweep:
    """A sweep that was read: its configuration, the run that it starts from, and its trials.

    `config.run` holds the run's values with what they extend: a sweep is compared with an earlier one by them.
    `extends` is the file that they extend, relative to the sweep's folder or absolute, if there is one.
    """

    config: SweepConfig
    base: RunConfig
    trials: tuple[Trial, ...]
    extends: str | None = None


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep and works out its trials, each checked as a run configuration.

    `overrides` change the sweep's own keys, and through `run.` those of its run. Raises ConfigError.
    """
    path = Path(path)
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in RunConfig.model_fields and section not in SweepConfig.model_fields:
            raise ConfigError(f"override {override!r} is of the run, in a sweep: -o run.{override}")
    file = read(path).get("run")
    if isinstance(file, str):
        # So that there is something to override; JSON is YAML.
        overrides = [f"run={json.dumps({'extends': file})}", *overrides]
    config = load(path, SweepConfig, overrides)
    values = _run_values(config.run, path)
    base = parse({"name": config.name, **values}, RunConfig, f"{path} (run)")
    extends = config.run if isinstance(config.run, str) else config.run.get("extends")
    config = config.model_copy(update={"run": values})
    trials = []
    for number, point in enumerate(points(config)):
        name = f"{config.name}-{number:03d}"
        nested = merge(merge({"name": config.name, **values}, _nested(point)), {"name": name})
        trials.append(Trial(number, point, parse(nested, RunConfig, f"{path}, trial {number} ({_show(point)})")))
    for trial in trials:
        if trial.config.detect.headline in IGNORE_ANOMALIES:
            raise ConfigError(
                f"{path}: the headline detector {trial.config.detect.headline!r} ignores anomalies, so every trial "
                "would come out the same. Set run.detect.headline to simplenet, head or fused"
            )
    return Sweep(config, base, tuple(trials), None if extends is None else str(extends))


def points(config: SweepConfig) -> list[dict[str, JsonValue]]:
    """The values of each trial by dotted name: the grid, and at each of its points the random draws.

    A draw depends on the seed, its number, the grid's point and the parameter's name: more draws, or a larger grid,
    leave the points that were there. Those that come out equal are there once.
    """
    grids = {name: p.grid for name, p in config.parameters.items() if isinstance(p, Grid)}
    out: dict[str, dict[str, JsonValue]] = {}
    for number in range(config.trials or 1):
        for values in itertools.product(*grids.values()):
            fixed = dict(zip(grids, values, strict=True))
            at = f"{config.seed}|{number}|{json.dumps(fixed, sort_keys=True)}"
            point = {
                name: fixed[name] if isinstance(p, Grid) else _draw(p, f"{at}|{name}")
                for name, p in config.parameters.items()
            }
            out.setdefault(json.dumps(point, sort_keys=True), point)
    return list(out.values())


def champion_config(sweep: Sweep, trial: Trial) -> RunConfig:
    """A trial's configuration as a run of its own, with a name that changes with its content."""
    where = {"name": sweep.config.name, "cluster": ClusterConfig()}  # which the sweep may be gone on with on another
    content = config_hash(trial.config.model_copy(update=where))
    return trial.config.model_copy(update={"name": f"{sweep.config.name}-champion-{content[:8]}"})


def dotted_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every name below a model, sections included; of a union the names of all its members. Not into tuples."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models(field.annotation):
            yield from dotted_names(inner, f"{prefix}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for part in get_args(annotation):
            yield from _models(part)


def _run_values(run: str | Mapping[str, Any], path: Path) -> dict[str, Any]:
    if isinstance(run, str):
        return read(path.parent / run)
    values = dict(run)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: run.extends must name a file, got {base!r}")
    return merge(read(path.parent / base), values)


def _draw(parameter: Choice | Uniform | LogUniform, seed: str) -> JsonValue:
    generator = random.Random(seed)
    if isinstance(parameter, Choice):
        return generator.choice(parameter.choice)
    if isinstance(parameter, Uniform):
        return generator.uniform(*parameter.uniform)
    low, high = (math.log(bound) for bound in parameter.loguniform)
    return math.exp(generator.uniform(low, high))


def _nested(point: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in point.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        out = merge(out, value)
    return out


def _show(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _increasing(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise ValueError(f"a range goes from a smaller number to a larger one, got {list(value)}")
    return value

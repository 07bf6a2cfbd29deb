"""YAML into configurations: composition by `extends:`, dotted overrides, errors that say where and what instead."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kka_ray.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def load(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Reads a YAML file into `model`.

    The file may name another with `extends: OTHER.yaml` (relative to itself), whose values it overrides key by key.
    `overrides` are `a.b.c=VALUE`, the value read as YAML. Raises ConfigError with the file, the key and the nearest
    valid name.
    """
    values = read(Path(path))
    for override in overrides:
        _apply(values, override)
    return parse(values, model, str(path))


def parse(values: Mapping[str, Any], model: type[Model], source: str) -> Model:
    """Checks a mapping against `model`. Raises ConfigError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e, model) for e in error.errors()]
        raise ConfigError(f"{source} is not a valid {model.__name__}:\n" + "\n".join(f"  {x}" for x in lines)) from None


def read(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with what it extends merged in. Raises ConfigError."""
    path = path.resolve()
    if path in _seen:
        raise ConfigError(f"{path} extends itself, by way of {' -> '.join(p.name for p in _seen)}")
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    base = values.pop("extends", None)
    if base is None:
        return values
    return merge(read(path.parent / base, (*_seen, path)), values)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mappings merged key by key.

    A mapping with another `kind` replaces the whole of the one below: its keys belong to another model.
    """
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            same_kind = "kind" not in value or value["kind"] == below.get("kind")
            out[key] = merge(below, value) if same_kind else dict(value)
        else:
            out[key] = value
    return out


def config_hash(config: BaseModel) -> str:
    """12 hex digits that name a configuration's content, wherever its run is kept."""
    content = config.model_dump(mode="json", exclude={"output", "store", "tracking"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def dump(config: BaseModel) -> str:
    """The configuration as YAML; `load` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    *parents, last = name.split(".")
    inner = values
    for part in parents:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    try:
        inner[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not valid YAML: {error}") from None


def _explain(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        wanted = str(error["loc"][-1])
        names = sorted(_field_names(model))
        near = difflib.get_close_matches(wanted, names, 1, 0.5)
        return f"{where}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if error["type"] == "missing":
        return f"{where}: is required"
    return f"{where}: {error['msg']} (got {error.get('input')!r})"


def _field_names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        yield from _nested_names(field.annotation)


def _nested_names(annotation: Any) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _field_names(annotation)
    for part in get_args(annotation):
        yield from _nested_names(part)

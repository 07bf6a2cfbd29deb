"""YAML into configurations: composition by `extends:`, dotted overrides, errors that say where and what instead."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from kka_ray.config.strict import NAME, TEXT, URL
from kka_ray.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

_WORDS = {
    "name": "must begin with a letter or digit and hold only A-Z, a-z, 0-9, '.', '_' and '-': it names a folder",
    "url": "must be a URL that begins with http:// or https://, as in http://localhost:8000/v1, without a user's name",
    "string_type": "must be a text, in quotes if YAML takes it for something else",
    "tuple_type": "must be a list, as in [a, b]",
    "list_type": "must be a list, as in [a, b]",
    "dict_type": "must be a mapping, as in {key: value}",
    "model_type": "must be a mapping, as in {key: value}",
    "model_attributes_type": "must be a mapping, as in {key: value}",
}
"""What is said of YAML where pydantic speaks of Python's types and of patterns."""

_PATTERNS = {NAME: "name", URL: "url"}


def load(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Reads a YAML file into `model`.

    The file may name another with `extends: OTHER.yaml` (relative to itself), whose values it overrides key by key.
    `overrides` are `a.b.c=VALUE`, the value read as YAML, unless only a text will do: `name=7` is one. Raises
    ConfigError with the file, the key and the nearest valid name.
    """
    values = read(Path(path))
    _refuse_another_verbs(values, model, str(path))
    for override in overrides:
        _apply(values, override)
    if overrides:
        _give_texts_back(values, model, overrides)
    return _check(values, model, str(path), file=Path(path))


def parse(values: Mapping[str, Any], model: type[Model], source: str) -> Model:
    """Checks a mapping against `model`. Raises ConfigError."""
    return _check(values, model, source)


def read(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with what it extends merged in. Raises ConfigError."""
    path = path.resolve()
    if path in _seen:
        raise ConfigError(f"{path} extends itself, by way of {' -> '.join(p.name for p in _seen)}")
    values, base = _read_one(path)
    if base is not None and not (path.parent / base).is_file():
        raise ConfigError(f"{path} extends {base}, and there is no file {path.parent / base}")
    return values if base is None else merge(read(path.parent / base, (*_seen, path)), values)


def extended(path: Path) -> Iterator[Path]:
    """What a YAML file that `read` takes extends, directly and by way of others.

    Relative to the folder of `path`; absolute is what is named so, and what that extends. Raises ConfigError.
    """
    path = path.resolve()
    _, base = _read_one(path)
    if base is not None:
        yield from with_extended(base, path.parent)


def with_extended(name: str, folder: Path) -> Iterator[Path]:
    """A YAML file that is named in a folder, and all that it extends; as `extended` has them."""
    yield Path(name)
    for further in extended(folder / name):
        yield Path(name).parent / further


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but for a key that stands twice in a mapping: of its values that one takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _read_one(path: Path) -> tuple[dict[str, Any], str | None]:
    """The mapping in a YAML file, and the name of what it extends."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    base = values.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: extends must name one file, as in `extends: demo.yaml`; it is {base!r}")
    return values, base


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


def _check(values: Mapping[str, Any], model: type[Model], source: str, file: Path | None = None) -> Model:
    """`file`: where the values were before some were given with `-o`, which may give a missing one as well."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e, model, file is not None) for e in error.errors()]
        if file is not None:
            faults = [_Place.of(model, e["loc"]).keys for e in error.errors()]
            lines += _of_another_kind(faults, read(file), values)
        raise ConfigError(f"{source} is not a valid {model.__name__}:\n" + "\n".join(f"  {x}" for x in lines)) from None


def _refuse_another_verbs(values: Mapping[str, Any], model: type[BaseModel], source: str) -> None:
    """Raises ConfigError if a file is written for another verb: each of its keys would be an error of its own."""
    from kka_ray.config.models import RunConfig
    from kka_ray.config.renderer import RendererConfig
    from kka_ray.config.sweep import SweepConfig

    if values.keys() <= model.model_fields.keys():
        return
    for verb, other in (("run", RunConfig), ("sweep", SweepConfig), ("renderer train", RendererConfig)):
        if values.keys() <= other.model_fields.keys():
            raise ConfigError(f"{source} is a configuration for `kka {verb}`")


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
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if text.lstrip().startswith("{"):
            raise ConfigError(f"override {override!r}: {text!r} is not valid YAML: {error}") from None
        value = text  # as a regular expression that begins with a bracket
    # A sentence with a colon, as "Photos of other things:", would be a mapping; one that is meant has braces. What
    # follows a # would be left out, and is meant as well.
    plain = text.strip()[:1] not in tuple("{['\"")
    cut = isinstance(value, str | None) and "#" in text
    inner[last] = text if plain and (cut or isinstance(value, dict)) else value


def _of_another_kind(faults: Sequence[Sequence[Any]], before: Any, after: Any, *at: str) -> Iterator[str]:
    """What to do where an override gave a section another `kind` and the rest, of the kind before, is at fault."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return
    old, new = before.get("kind"), after.get("kind")
    if at and old is not None and new not in (None, old) and any(tuple(f[: len(at)]) == at != tuple(f) for f in faults):
        name = ".".join(at)
        yield (
            f"{name} is of kind {old} in the file, and keeps its other keys where only the kind is changed: "
            f"give it whole, as in -o '{name}={{kind: {new}}}'"
        )
    for key in sorted(before.keys() & after.keys()):
        yield from _of_another_kind(faults, before[key], after[key], *at, key)


def _give_texts_back(values: dict[str, Any], model: type[BaseModel], overrides: Sequence[str]) -> None:
    """What YAML takes for a number, a date or a truth value is the text again where `model` wants one."""
    given = {tuple(name.split(".")): text for name, _, text in (override.partition("=") for override in overrides)}
    try:
        model.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            keys = _Place.of(model, problem["loc"]).keys
            meant = not isinstance(problem["input"], dict | None)
            if problem["type"] == "string_type" and meant and keys in given:
                inner = values
                for key in keys[:-1]:
                    inner = inner[key]
                inner[keys[-1]] = given[keys]


def _explain(error: Any, model: type[BaseModel], overridable: bool) -> str:
    """One error in words: the key as the file has it, what is wrong with it, and what to do."""
    place = _Place.of(model, error["loc"])
    where, kind = ".".join(str(key) for key in place.keys), error["type"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_instead(str(place.keys[-1]), place.names)}"
    if kind in ("missing", "union_tag_not_found"):
        # Of a section that is chosen by its `kind`, that is what is missing.
        where = f"{where}.kind" if place.choices else where
        # Lists cannot be reached from the command line.
        how = f"; give it as -o {where}=VALUE" if overridable and not _has_index(place.keys) else ""
        what = f"one of {', '.join(place.choices)}" if place.choices else place.description
        return f"{where}: is required{how}{f' ({what})' if what else ''}"
    if kind == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        return f"{where}.kind: there is no {tag!r}{_instead(tag, place.choices)}"
    if kind == "string_pattern_mismatch" and error["ctx"]["pattern"] == TEXT:
        return f"{where}: must say something ({place.description})"
    if kind == "string_pattern_mismatch":
        kind = _PATTERNS.get(error["ctx"]["pattern"], kind)
    said = _WORDS.get(kind) or error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    if isinstance(given, str):
        given = re.sub(r"//[^/@]*@", "//...@", given)  # a URI's password
    shown = f" (got {given!r})" if isinstance(given, str | int | float | None) else ""
    return f"{where}: {said}{shown}" if where else said


def _instead(wanted: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, names, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(names)}" if names else ""


def _has_index(keys: Sequence[Any]) -> bool:
    return any(isinstance(key, int) for key in keys)


@dataclass(frozen=True)
class _Place:
    """A place within a model.

    keys: as in the file, without the labels that pydantic adds to its locations for the member of a union.
    names: of the keys beside the last one; empty where they are free.
    description: of the last one.
    choices: of the union that is there, where a `kind` chooses among its members.
    """

    keys: tuple[Any, ...]
    names: tuple[str, ...]
    description: str
    choices: tuple[str, ...]

    @classmethod
    def of(cls, model: type[BaseModel], location: Sequence[Any]) -> _Place:
        keys: list[Any] = []
        names: tuple[str, ...] = ()
        description = ""
        at: Any = model
        for part in location:
            members = _members(at)
            if len(members) > 1:
                label = str(part).split("[")[0]
                at = next((member for labels, member in members if label in labels), Any)
                continue
            ((_, at),) = members
            keys.append(part)
            if isinstance(at, type) and issubclass(at, BaseModel):
                names, field = tuple(at.model_fields), at.model_fields.get(part)
                description = (field.description or "") if field else ""
                at = field.annotation if field else Any
            else:
                # The values of a mapping, or the items of a list.
                names, description = (), ""
                at = next((a for a in reversed(get_args(at)) if a is not Ellipsis), Any)
        members = _members(at)
        chosen = len(members) > 1 and all("kind" in getattr(m, "model_fields", ()) for _, m in members)
        choices = tuple(label for labels, _ in members for label in labels) if chosen else ()
        return cls(tuple(keys), names, description, choices)


def _members(annotation: Any) -> list[tuple[tuple[str, ...], Any]]:
    """The members of a union, None left out, each with the labels that pydantic gives it in locations.

    What is no union is its own only member.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *notes = get_args(annotation)
        tags = tuple(str(note.tag) for note in notes if isinstance(note, Tag))
        return [(tags, inner)] if tags else _members(inner)
    if origin in (Union, UnionType):
        return [m for part in get_args(annotation) if part is not type(None) for m in _members(part)]
    kind = getattr(annotation, "model_fields", {}).get("kind")
    labels = get_args(kind.annotation) if kind else (getattr(origin or annotation, "__name__", ""),)
    return [(labels, annotation)]

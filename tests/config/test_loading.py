import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from kka_ray.config import RunConfig, config_hash, dump, load, merge, parse
from kka_ray.config.loading import read
from kka_ray.config.models import FolderData
from kka_ray.config.renderer import RendererConfig
from kka_ray.config.sweep import SweepConfig
from kka_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
GIVEN = {
    "cifar100_furniture": ["data.path=x"],
    "detectors_32px": ["data.path=x"],
    "oxford102": ["data.path=x"],
    "ucm_captions": ["data.path=x"],
    "magnetic_tile": ["data.path=x"],
    "folder": ["data.path=x", "data.description=a screw"],
}


RUNS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "gpu").glob("*.yaml")])


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f.stem)
def test_every_shipped_run_loads_and_is_written_back_equal(file: Path, tmp_path: Path) -> None:
    config = load(file, RunConfig, ["data.path=x"] if file.parent.name == "gpu" else GIVEN.get(file.stem, []))
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml", RunConfig) == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "renderer").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_shipped_renderer_loads(file: Path) -> None:
    assert load(file, RendererConfig, ["data=x"]).name == file.stem


def test_a_renderer_of_a_folder_wants_that_folder(tmp_path: Path) -> None:
    file = ROOT / "configs" / "renderer" / "folder.yaml"
    with pytest.raises(ConfigError, match="data: is required.*-o data=DIR"):
        load(file, RendererConfig)
    config = load(file, RendererConfig, ["data=."])
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml", RendererConfig) == config


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ndata: {kind: flowers}\nloop: {ronds: 2}\n")
    with pytest.raises(ConfigError, match="loop.ronds: unknown key; did you mean 'rounds'"):
        load(tmp_path / "run.yaml", RunConfig)


def said(values: dict[str, Any], tmp_path: Path, *overrides: str) -> list[str]:
    """What is wrong with a run of flowers that has these values as well, without the heading."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "x", "data": {"kind": "flowers"}} | values))
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "run.yaml", RunConfig, overrides)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_missing_key_is_named_as_it_is_given(tmp_path: Path) -> None:
    folder = {"data": {"kind": "folder"}}
    path, description = said(folder, tmp_path)
    assert path.startswith("data.path: is required; give it as -o data.path=VALUE")
    assert description == (
        "data.description: is required; give it as -o data.description=VALUE (what the normal images show, in a few "
        "words: 'a steel screw')"
    )
    assert said(folder, tmp_path, "data.description=a screw") == [path]
    assert load(tmp_path / "run.yaml", RunConfig, ["data.description=a screw", "data.path=x"]).data.kind == "folder"
    with pytest.raises(ConfigError) as error:
        parse({"name": "x"} | folder, RunConfig, "a program's values")
    assert "-o" not in str(error.value), "a program has no command line"


def test_a_kind_that_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    for values in ({"data": {}}, {"data": {"path": "x"}}):
        (line,) = said(values, tmp_path)
        assert line.startswith("data.kind: is required; give it as -o data.kind=VALUE (one of flowers, cifar100, ")
    assert said({"data": {"kind": "foldr"}}, tmp_path) == ["data.kind: there is no 'foldr'; did you mean 'folder'?"]
    (line,) = said({"detect": {"detectors": [{"neighbours": 3}]}}, tmp_path)
    assert line.startswith("detect.detectors.0.kind: is required (one of simplenet, ")
    assert "head, fused, " in line


@pytest.mark.parametrize(
    "override", ["describe.sampler.model=hub:org/llm", "describe.sampler.batch=8", "confusion.evaluator.epochs=20"]
)
def test_a_section_whose_kind_has_a_default_is_of_that_kind(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.yaml").write_text("{name: x, data: {kind: flowers}}")
    config = load(tmp_path / "run.yaml", RunConfig, [override])
    default = load(tmp_path / "run.yaml", RunConfig)
    assert config.describe.sampler.kind == default.describe.sampler.kind == "transformers"
    assert config.confusion.evaluator.kind == default.confusion.evaluator.kind == "deep_sad"
    assert config != default


def test_a_kind_that_is_changed_alone_says_what_became_of_the_rest(tmp_path: Path) -> None:
    values = {"confusion": {"evaluator": {"kind": "fused", "deep_sad": {"epochs": 3}}}}
    key, how = said(values, tmp_path, "confusion.evaluator.kind=knn")
    assert key.startswith("confusion.evaluator.deep_sad: unknown key")
    assert "is of kind fused in the file" in how
    whole = how.split("-o ")[1].strip("'")
    assert load(tmp_path / "run.yaml", RunConfig, [whole]).confusion.evaluator.kind == "knn"
    (line,) = said(values, tmp_path, "confusion.evaluator.kind=knn", "loop.round=1", "confusion.evaluator={kind: knn}")
    assert line.startswith("loop.round: unknown key"), "what is right is not spoken of"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"data": {"kind": "flowers", "normal": 9}}, "data.normal: unknown key; did you mean 'normals'?"),
        (
            {"data": {"kind": "flowers", "path": "x"}},
            "data.path: unknown key; there are kind, normals, test_normals, test_anomalies, validation",
        ),
        (
            {"detect": {"detectors": [{"kind": "simplenet"}, {"kind": "knn", "neighbors": 3}]}},
            "detect.detectors.1.neighbors: unknown key; did you mean 'neighbours'?",
        ),
        (
            {"cluster": {"samplers": {"runtime_env": {"env_vars": {"A": 3}}}}},
            "cluster.samplers.runtime_env.env_vars.A: must be a text, in quotes if YAML takes it for something else "
            "(got 3)",
        ),
        ({"detect": {"controls": "noise"}}, "detect.controls: must be a list, as in [a, b] (got 'noise')"),
        ({"loop": 3}, "loop: must be a mapping, as in {key: value} (got 3)"),
        ({"detect": {"detectors": ["knn"]}}, "detect.detectors.0: must be a mapping, as in {key: value} (got 'knn')"),
        (
            {"name": "größe 1"},
            "name: must begin with a letter or digit and hold only A-Z, a-z, 0-9, '.', '_' and '-': it names a folder "
            "(got 'größe 1')",
        ),
        (
            {"data": {"kind": "folder", "path": "x", "description": " "}},
            "data.description: must say something (what the normal images show, in a few words: 'a steel screw')",
        ),
        (
            {"describe": {"sampler": {"kind": "vllm", "gpu_memory": 2}}},
            "describe.sampler.gpu_memory: Input should be less than or equal to 1 (got 2)",
        ),
        (
            {"store": {"uri": "s3:/bucket/kka"}},
            "store.uri: looks like a URI with one slash; write two, as in s3://bucket/folder (got 's3:/bucket/kka')",
        ),
        (
            {"describe": {"sampler": {"kind": "api", "model": "m", "base_url": "localhost:8000"}}},
            "describe.sampler.base_url: must be a URL that begins with http:// or https://, as in "
            "http://localhost:8000/v1, without a user's name (got 'localhost:8000')",
        ),
        (
            {"detect": {"detectors": [{"kind": "simplenet"}, {"kind": "energy_head", "normal_energy": 5}]}},
            "detect.detectors.1: normal_energy 5.0 must be less than anomalous_energy 3.0",
        ),
    ],
)
def test_places_are_named_as_in_the_file(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    assert said(values, tmp_path) == [expected]


def test_what_is_wrong_with_the_whole_is_said_without_its_values(tmp_path: Path) -> None:
    (line,) = said({"render": {"normals": 0}}, tmp_path)
    assert line.startswith("detect asks for drawn normals, but render.normals is 0")
    assert "got" not in line
    (line,) = said({"loop_": {}}, tmp_path)
    assert line == "loop_: unknown key; did you mean 'loop'?"


def test_unions_without_a_kind_are_looked_into_as_well() -> None:
    values = {"name": "s", "run": 3, "parameters": {"loop.rounds": {"grid": []}}}
    with pytest.raises(ConfigError) as error:
        parse(values, SweepConfig, "s")
    lines = [line.strip().split(": ")[0] for line in str(error.value).splitlines()[1:]]
    assert lines == ["run", "run", "parameters.loop.rounds.grid"]


def test_overrides_are_yaml_and_reach_into_sections(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ndata: {kind: flowers}\n")
    config = load(tmp_path / "run.yaml", RunConfig, ["loop.rounds=0", "describe.guard.normal_vocabulary=true"])
    assert config.loop.rounds == 0
    assert config.describe.guard.normal_vocabulary is True


@pytest.mark.parametrize("override", ["loop.rounds", "=3", "name.first=x"])
def test_bad_overrides_are_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ndata: {kind: flowers}\n")
    with pytest.raises(ConfigError, match="override"):
        load(tmp_path / "run.yaml", RunConfig, [override])


@pytest.mark.parametrize("text", ["Photos of other things:", "a screw: M4", "M4: steel: a screw", "50 %"])
def test_a_sentence_is_a_text_whatever_yaml_makes_of_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ndata: {kind: flowers}\n")
    given = [f"describe.contrast={text}", "render.mask={min_area: 0.1, max_area: 0.2}", "render.mode=img2img"]
    config = load(tmp_path / "run.yaml", RunConfig, given)
    assert config.describe.contrast == text
    assert config.render.mask is not None
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "run.yaml", RunConfig, ["render.mask={min_area: 0.1"])


@pytest.mark.parametrize("text", ["bolt #4 head", "#4", "4 # four", "[0-9]", "[a-z]+(.*)", '"quoted" bolt', "a: b # c"])
def test_a_text_is_not_cut_or_taken_for_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ndata: {kind: folder, path: x}\n")
    config = load(tmp_path / "run.yaml", RunConfig, [f"data.description={text}"])
    assert isinstance(config.data, FolderData)
    assert config.data.description == text
    grouped = load(tmp_path / "run.yaml", RunConfig, ["data.description=a", f"data.group={text.replace('(.*)', '')}()"])
    assert isinstance(grouped.data, FolderData)
    assert grouped.data.group == f"{text.replace('(.*)', '')}()"


@pytest.mark.parametrize("text", ["7", "007", "2026-03-01", "no", "1e3"])
def test_a_text_is_one_though_yaml_has_another_word_for_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ndata: {kind: folder}\n")
    given = [f"name={text}", f"data.path={text}", f"data.description={text}", "seed=7"]
    config = load(tmp_path / "run.yaml", RunConfig, given)
    assert (config.name, config.seed) == (text, 7)
    assert isinstance(config.data, FolderData)
    assert config.data.path == config.data.description == text
    for value in ("{a: b}", ""):
        with pytest.raises(ConfigError, match="name: must be a text"):
            load(tmp_path / "run.yaml", RunConfig, [*given, f"name={value}"])


def test_extends_merges_key_by_key_and_refuses_circles(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\ndata: {kind: flowers, normals: 50}\nloop: {rounds: 3}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nname: run\nloop: {lines: 8}\n")
    config = load(tmp_path / "run.yaml", RunConfig)
    assert (config.name, config.loop.rounds, config.loop.lines, config.data.normals) == ("run", 3, 8, 50)
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load(tmp_path / "circle.yaml", RunConfig)


def test_another_kind_replaces_the_whole_section() -> None:
    merged = merge({"data": {"kind": "flowers", "normals": 5}}, {"data": {"kind": "folder", "path": "x"}})
    assert merged["data"] == {"kind": "folder", "path": "x"}


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "name: ../x\ndata: {kind: flowers}\n", "name: x\n"])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="run.yaml"):
        load(tmp_path / "run.yaml", RunConfig)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: x\ndata: {kind: flowers}\nloop: {rounds: 1}\nloop: {lines: 64}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML: 'loop' stands twice\n.*line 4, column 1"):
        load(file, RunConfig)
    file.write_text("a: &a {inner: &i {rounds: 1}}\nb: &b {<<: *i, rounds: 0}\n")
    assert read(file)["b"] == {"rounds": 0}, "merged, it is a value of its own"
    file.write_text("name: x\ndata: {kind: flowers}\n")
    with pytest.raises(ConfigError, match="'rounds' stands twice"):
        load(file, RunConfig, ["loop={rounds: 1, lines: 64, rounds: 2}"])


def test_hash_names_the_content(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ndata: {kind: flowers}\n")
    one, two = load(tmp_path / "run.yaml", RunConfig), load(tmp_path / "run.yaml", RunConfig, ["seed=1"])
    assert config_hash(one) == config_hash(load(tmp_path / "run.yaml", RunConfig)) != config_hash(two)


def test_importing_the_configuration_loads_nothing_heavy() -> None:
    code = "import sys, kka_ray.config; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_drawn_normals_that_are_asked_for_must_be_drawn() -> None:
    for detect in ({"drawn_normals": True}, {"controls": ["drawn_normals"]}):
        values = {"name": "x", "data": {"kind": "flowers"}, "detect": detect}
        assert RunConfig.model_validate(values).render.normals > 0
        with pytest.raises(ValidationError, match=r"render\.normals is 0"):
            RunConfig.model_validate(values | {"render": {"normals": 0}})


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes("name: x\ndata: {kind: folder, path: p, description: ein Stück}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8 text \(byte \d+\)"):
        load(file, RunConfig)


@pytest.mark.parametrize("seed", [-1, 4_000_000])
def test_seeds_that_a_library_would_refuse_later_are_refused(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: x\ndata: {kind: flowers}\n")
    with pytest.raises(ConfigError, match="seed"):
        load(file, RunConfig, [f"seed={seed}"])
    assert load(file, RunConfig, ["seed=3999999"]).seed * 1000 + 999 < 2**32


def test_a_file_extends_one_other(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("extends: [a.yaml, b.yaml]\n")
    with pytest.raises(ConfigError, match="extends must name one file"):
        load(file, RunConfig)
    file.write_text("extends: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"run\.yaml extends gone\.yaml, and there is no file .*gone\.yaml"):
        load(file, RunConfig)


@pytest.mark.parametrize(
    ("file", "model", "verb"),
    [
        ("tune_configs/smoke.yaml", RunConfig, "sweep"),
        ("configs/demo.yaml", SweepConfig, "run"),
        ("configs/demo.yaml", RendererConfig, "run"),
        ("configs/renderer/flowers.yaml", RunConfig, "renderer train"),
    ],
)
def test_a_configuration_for_another_verb_is_named(file: str, model: type[BaseModel], verb: str) -> None:
    with pytest.raises(ConfigError, match=rf"{file} is a configuration for `kka {verb}`$"):
        load(ROOT / file, model)

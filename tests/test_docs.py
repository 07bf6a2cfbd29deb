"""The documentation and the examples against the code: links, names and fields that they give are there."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

import kka_ray
from kka_ray.config import RunConfig, load, merge, parse, read
from kka_ray.config.renderer import RendererConfig
from kka_ray.config.sweep import SweepConfig, dotted_names
from tests.report import fake_run
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for where in ("*.md", "docs/*.md", "jobs/*.md", "kka_ray/**/README.md") for page in ROOT.glob(where)
)


def example(name: str) -> ModuleType:
    """An example as a module."""
    return load_script(ROOT / "examples" / f"{name}.py")


def _anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_files_are_there(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?", text):
        if "://" not in target:
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file.read_text()), f"{target}#{anchor}"
    for file in re.findall(r"\b(?:configs|tune_configs)/[\w./-]+\.yaml", text):
        assert "NAME" in file or (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    known = {*dotted_names(RunConfig), *dotted_names(RendererConfig)}
    known |= {f"run.{name}" for name in dotted_names(RunConfig)}
    for name in re.findall(r"-o '?([a-z_]+(?:\.[a-z_]+)*)=", text):
        assert name in known or name == "section.key", name
    sections = set(RunConfig.model_fields)
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)", text):
        if name.split(".")[0] in sections and not name.endswith((".py", ".safetensors")):
            assert name in known, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and trainings as they are written, but for those of configurations that the reader makes."""
    monkeypatch.chdir(ROOT)
    kinds = {"kka run": RunConfig, "kka renderer train": RendererConfig, "kka doctor": RunConfig}
    for block in re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            # Of any configuration the demo's is one.
            kind = next((k for k in kinds if line.startswith((f"{k} configs/", f"{k} CONFIG"))), None)
            if kind:
                words = shlex.split(line.replace(" CONFIG ", " configs/demo.yaml "), comments=True)
                overrides = [value for option, value in itertools.pairwise(words) if option == "-o"]
                load(words[len(kind.split())], kinds[kind], overrides)


def test_configurations_of_the_how_to_are_valid() -> None:
    run, sweep = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "howto.md").read_text(), re.DOTALL)
    values = yaml.safe_load(run)
    base = read(ROOT / "configs" / values.pop("extends"))
    parse(merge(merge(base, values), {"data": {"path": "x"}}), RunConfig, "docs/howto.md")
    values = yaml.safe_load(sweep)
    assert (ROOT / "tune_configs" / values["run"]["extends"]).is_file()
    parse(values, SweepConfig, "docs/howto.md")


def test_every_verb_is_in_the_readme() -> None:
    from kka_ray.cli import app, bench_app, renderer_app

    text = (ROOT / "README.md").read_text()
    for prefix, typer_app in (("", app), ("bench ", bench_app), ("renderer ", renderer_app)):
        for command in typer_app.registered_commands:
            assert command.callback is not None
            assert f"`kka {prefix}{command.name or command.callback.__name__}" in text


def test_every_module_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = Path(kka_ray.__file__).parent
    for module in package.iterdir():
        name = f"{module.name}/" if (module / "__init__.py").is_file() else module.name
        if (module.suffix == ".py" and module.stem != "__init__") or name.endswith("/"):
            assert f"`{name}`" in text, name


def test_every_field_of_a_summary_is_documented(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "run_folder.md").read_text()
    summary = fake_run.write(tmp_path)
    names = {*summary, *summary["rounds"][0], *summary["truth"], *summary["evaluation"][0], "drawn_normals", "api"}
    names |= {*summary["rounds"][1]["dpo"], *summary["rounds"][1]["seconds"], "usage"}
    for name in names:
        assert f"`{name}`" in text, name
    for table in (tmp_path / "records").iterdir():
        assert f"| `{table.stem}` |" in text, table.stem


def test_the_tables_of_a_run_are_joined(tmp_path: Path) -> None:
    summary = fake_run.write(tmp_path, lines=64)
    table = example("read_a_run").joined(tmp_path)
    assert len(table) == sum(r["described"] for r in summary["rounds"])
    by_round = table[table["label"] == "hard"].groupby("round").size()
    assert by_round.tolist() == [r["hard"] for r in summary["rounds"]]
    assert table.loc[table["status"] == "rejected", "drawn"].isna().all()


def test_images_are_scored_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kka_ray.detectors.tuned import Scores, TunedDetector

    class Fake:
        def score_images(self, images: list[np.ndarray]) -> Scores:
            assert [image.shape for image in images] == [(64, 64, 3)]
            return Scores(np.ones(1), np.full(1, 2.5), np.full(1, 99.0), np.ones(1, bool))

    assert callable(TunedDetector.score_images)
    module = example("score_in_python")
    monkeypatch.setattr(module, "load_detector", lambda folder: Fake())
    (tmp_path / "a.png").write_bytes(fake_run.bank()[0][0])
    module.main("runs/demo", str(tmp_path / "a.png"))
    assert capsys.readouterr().out.endswith("a.png: anomalous, score 1.000, +2.5 MADs from the median of the normals\n")


def test_the_service_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from starlette.testclient import TestClient

    from kka_ray.config.serve import ServeConfig
    from kka_ray.serving.access import digest
    from kka_ray.serving.app import create_app
    from kka_ray.serving.scorer import Judgement

    class Fake:
        async def score(self, items: list[Any]) -> list[Judgement]:
            return [Judgement(1.5, 2.5, 99.0, True, 1.0) for _ in items]

        async def describe(self) -> dict[str, Any]:
            return {}

    client = TestClient(create_app(Fake(), ServeConfig(), digest("a-token-for-the-tests")))  # type: ignore[arg-type]
    module = example("ask_the_service")

    def post(url: str, timeout: float, **arguments: Any) -> Any:
        return client.post(url.removeprefix("http://127.0.0.1:8000"), **arguments)

    monkeypatch.setattr(module.requests, "post", post)
    (tmp_path / "a.png").write_bytes(fake_run.bank()[0][0])
    monkeypatch.setenv("KKA_SERVE_TOKEN", "a-token-for-the-tests")
    module.main(str(tmp_path / "a.png"))
    assert capsys.readouterr().out == "a.png: anomalous, score 1.500, threshold 1.000\n"
    monkeypatch.setenv("KKA_SERVE_TOKEN", "another")
    with pytest.raises(SystemExit, match="status 401"):
        module.main(str(tmp_path / "a.png"))


def test_examples_are_short() -> None:
    for file in (ROOT / "examples").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 30, file.name


def test_json_in_the_documentation_is_valid() -> None:
    for page in PAGES:
        for block in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL):
            json.loads(block)

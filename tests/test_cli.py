"""What the verbs themselves do; what they call is tested where it is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from kka_ray import __version__, cli, doctor
from kka_ray.cluster.estimate import Estimate
from kka_ray.cluster.plan import make_plan
from kka_ray.config import dump
from kka_ray.config.models import RunConfig
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.terminal import Reporter, show_plan

ROOT = Path(__file__).parents[1]


def test_doctor_takes_overrides_as_other_verbs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig | None] = []

    def examine(config: RunConfig | None) -> list[doctor.Finding]:
        seen.append(config)
        return []

    monkeypatch.setattr(doctor, "examine", examine)
    folder = str(ROOT / "configs" / "folder.yaml")
    done = CliRunner().invoke(cli.app, ["doctor", folder, "-o", "data.path=x", "-o", "data.description=a screw"])
    assert done.exit_code == 0
    assert seen[0] is not None
    assert seen[0].data.kind == "folder"
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0
    assert seen[1] is None
    for arguments, said in ((["doctor", folder], "-o data.path=VALUE"), (["doctor", "-o", "seed=1"], "name one")):
        error = CliRunner().invoke(cli.app, arguments).exception
        assert isinstance(error, ConfigError)
        assert said in str(error)


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"kka_ray {__version__}\n")


@pytest.mark.parametrize("verb", ["resume", "report"])
def test_resume_and_report_want_the_folder_of_a_run(tmp_path: Path, verb: str) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        error = CliRunner().invoke(cli.app, [verb, str(folder)]).exception
        assert isinstance(error, ConfigError)
        assert "name a run's folder, as in runs/demo" in str(error)


def test_resume_does_not_advise_what_it_cannot_be_given(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {kind: flowers}\n")
    for folder in (str(tmp_path), f"file://{tmp_path}"):
        error = CliRunner().invoke(cli.app, ["resume", folder]).exception
        assert isinstance(error, ConfigError)
        assert (
            str(error)
            == f"{folder}/config.yaml is not a valid RunConfig:\n  name: is required (names the run's folder)"
        )


def test_resume_does_not_work_in_another_folder_than_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_on: list[RunConfig] = []
    monkeypatch.setattr(cli, "_run", lambda config, verbose: gone_on.append(config))
    config = RunConfig.model_validate({"name": "demo", "data": {"kind": "flowers"}, "output": str(tmp_path / "runs")})
    for folder in (tmp_path / "runs" / "demo", tmp_path / "copy"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(config))
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "demo")
    error = CliRunner().invoke(cli.app, ["resume", str(tmp_path / "copy")]).exception
    assert isinstance(error, ConfigError)
    assert f"`kka resume {tmp_path}/runs/demo`" in str(error)
    assert "copy/config.yaml" in str(error)
    assert not gone_on
    for folder in (tmp_path / "runs" / "demo", tmp_path / "link", f"file://{tmp_path}/runs/demo/"):
        assert CliRunner().invoke(cli.app, ["resume", str(folder)]).exit_code == 0
    assert gone_on == [config] * 3
    (tmp_path / "copy" / "config.yaml").write_text(
        dump(config.model_copy(update={"output": str(tmp_path), "name": "copy"}))
    )
    assert CliRunner().invoke(cli.app, ["resume", str(tmp_path / "copy")]).exit_code == 0


def test_square_brackets_and_colons_of_an_error_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be taken for markup and for emoji."""

    def fail(**_: object) -> None:
        raise ResourceError("pip install -e '.[onnx]' a:x:b")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "pip install -e '.[onnx]' a:x:b" in capsys.readouterr().err


def test_a_dry_run_prints_yaml_whatever_the_texts_hold(tmp_path: Path) -> None:
    texts = {"instruction": "[INST] Flowers [/INST] [b]rare[/b] 1:on:2:", "contrast": "Rare flowers, " * 12 + "other:"}
    given = [part for name, text in texts.items() for part in ("-o", f"describe.{name}={json.dumps(text)}")]
    done = CliRunner().invoke(cli.app, ["run", str(ROOT / "configs" / "demo.yaml"), "--dry-run", *given])
    assert done.exit_code == 0
    assert "# resource plan" in done.output
    printed = yaml.safe_load(done.output)
    assert {name: printed["describe"][name] for name in texts} == texts
    assert RunConfig.model_validate(printed).seed == 0


def test_a_sweep_s_dry_run_prints_what_any_trial_asks_for() -> None:
    file = str(ROOT / "tune_configs" / "smoke.yaml")
    varied = ['parameters={"preference.workers": {"grid": [1, 4]}}', "trials=null", "run.preference.micro_batch=1"]
    overrides = [part for override in varied for part in ("-o", override)]
    done = CliRunner().invoke(cli.app, ["sweep", file, "--dry-run", *overrides])
    assert done.exit_code == 0, done.exception
    assert done.output.count("# resource plan") == 1
    assert "1 x" in done.output
    assert "4 x" in done.output


def test_a_plan_shows_the_names_of_models_whole() -> None:
    plan = make_plan(RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}}))
    console = Console(width=80, file=io.StringIO(), record=True)
    places = {(phase.name, share.name): {"127.0.0.1": 1} for phase in plan.phases for share in phase.shares}
    times = [Estimate("describe", "1 line", 1.0), Estimate("render", "1 image", 1.0)]
    show_plan(plan, places, times, turns=False, console=console)
    text = console.export_text()
    assert "…" not in text
    assert "builtin:smollm2-135m-instruct" in text
    assert text.count("127.0.0.1") == sum(len(phase.shares) for phase in plan.phases)
    assert "it fits" in text


def test_a_plan_counts_one_process_in_the_singular() -> None:
    workers = {"samplers": {"workers": 2}, "train_threads": 1}
    config = RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}, "cluster": workers})
    plan, console = make_plan(config), Console(width=200, file=io.StringIO(), record=True)
    places = {(phase.name, share.name): {"127.0.0.1": 1} for phase in plan.phases for share in phase.shares}
    times = [Estimate("describe", "1 line", 1.0), Estimate("render", "1 image", 1.0)]
    show_plan(plan, places, times, turns=False, console=console)
    lines = [line.strip() for line in console.export_text().splitlines()]
    for processes in ("2 samplers ", "1 renderer ", "1 DPO worker ", "1 detector worker "):
        assert any(line.startswith(processes) for line in lines)


def test_warnings_are_printed_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=40)
    Reporter(console).warn("cannot read scan[rot].png, a[/b].png")
    assert console.file.getvalue() == "warning: cannot read scan[rot].png, a[/b].png\n"  # type: ignore[attr-defined]

"""What the verbs themselves do; what they call is tested where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kka_ray import cli, doctor
from kka_ray.config.models import RunConfig
from kka_ray.errors import ConfigError, ResourceError

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


def test_resume_wants_the_folder_of_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        error = CliRunner().invoke(cli.app, ["resume", str(folder)]).exception
        assert isinstance(error, ConfigError)
        assert "name a run's folder, as in runs/demo" in str(error)


def test_square_brackets_of_an_error_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be taken for markup."""

    def fail(**_: object) -> None:
        raise ResourceError("pip install -e '.[onnx]'")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "pip install -e '.[onnx]'" in capsys.readouterr().err

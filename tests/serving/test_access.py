import stat
from pathlib import Path

import pytest

from kka_ray.config.serve import ServeConfig
from kka_ray.errors import AssetError, ConfigError, ResourceError
from kka_ray.serving import start
from kka_ray.serving.access import digest, is_authorised, make_digest


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.delenv("KKA_SERVE_TOKEN", raising=False)
    monkeypatch.setenv("KKA_CACHE", str(tmp_path / "cache"))


def test_a_new_token_is_written_for_its_owner_only():
    expected, file = make_digest(Path("runs/demo"))
    assert file is not None
    assert file.name == "demo.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_text().strip()
    assert len(token) >= 32
    assert is_authorised(f"Bearer {token}", expected)
    file.chmod(0o644)
    other, again = make_digest(Path("runs/demo"))
    assert (again, other == expected) == (file, False)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [p.name for p in file.parent.iterdir()] == ["demo.token"]


def test_the_environments_token_is_taken_and_written_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("KKA_SERVE_TOKEN", "from-the-environment")
    assert make_digest(Path("runs/demo")) == (digest("from-the-environment"), None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("token", ["", "short", "with a space in the middle", "ünïcode-ünïcode-ünïcode"])
def test_tokens_that_can_be_guessed_or_not_sent_are_refused(monkeypatch, token):
    monkeypatch.setenv("KKA_SERVE_TOKEN", token)
    with pytest.raises(ConfigError, match="at least 16") as error:
        make_digest(Path("runs/demo"))
    assert not token or token not in str(error.value)


@pytest.mark.parametrize(("header", "allowed"), [("bearer abc", True), ("Bearer  abc ", True), ("Token abc", False)])
def test_schemes(header, allowed):
    assert is_authorised(header, digest("abc")) is allowed


def test_starting_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(AssetError, match="holds no detector"):
        start(tmp_path, ServeConfig(), blocking=False)
    (tmp_path / "detector.json").touch()
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="choose another --port"):
            start(tmp_path, ServeConfig(port=taken.getsockname()[1]), blocking=False)


def test_serves_own_tools_build_the_application(tmp_path, monkeypatch):
    from serve.app import build

    monkeypatch.setenv("KKA_SERVE_TOKEN", "from-the-environment")
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "detector.json").touch()
    ingress = build({"run": str(tmp_path), "replicas": "2", "batch": 4})._bound_deployment
    (detector, config, expected) = ingress.init_args
    assert (config.replicas, config.batch) == (2, 4)
    assert expected == digest("from-the-environment")
    assert detector._bound_deployment.num_replicas == 2
    with pytest.raises(ConfigError, match="run=runs/demo"):
        build({})
    with pytest.raises(ConfigError, match="did you mean 'replicas'"):
        build({"run": str(tmp_path), "replica": 2})
    with pytest.raises(ConfigError, match="http_options"):
        build({"run": str(tmp_path), "port": 1})


def test_the_deployment_file_builds(tmp_path, monkeypatch):
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from serve.app import build

    monkeypatch.setenv("KKA_SERVE_TOKEN", "from-the-environment")
    (tmp_path / "detector.json").touch()
    values = yaml.safe_load((Path(__file__).parents[2] / "serve" / "config.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(values).applications
    assert application.import_path == "serve.app:build"
    build(application.args | {"run": str(tmp_path)})
    assert values["http_options"]["host"] == "127.0.0.1"

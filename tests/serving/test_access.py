import re
import socket
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from kka_ray import serving
from kka_ray.config.serve import ServeConfig
from kka_ray.errors import AssetError, ConfigError, ResourceError
from kka_ray.serving import start
from kka_ray.serving.access import digest, is_authorised, make_token, write_token


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.delenv("KKA_SERVE_TOKEN", raising=False)
    monkeypatch.setenv("KKA_CACHE", str(tmp_path / "cache"))


def test_a_new_token_is_written_for_its_owner_only():
    token = make_token()
    file = write_token(token, Path("runs/demo"), 8000)
    assert file is not None
    assert re.fullmatch(r"demo-8000-[0-9a-f]{8}\.token", file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    written = file.read_text().strip()
    assert len(written) >= 32
    assert written not in repr(token)
    assert is_authorised(f"Bearer {written}", token.digest)
    file.chmod(0o644)
    other = make_token()
    assert other.digest != token.digest
    assert write_token(other, Path("runs/demo").resolve(), 8000) == file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_services_have_files_of_their_own():
    served = [
        ("runs/demo", 8000),
        ("runs/demo", 8001),
        ("old/demo", 8000),
        ("s3://b/runs/demo", 8000),
        ("runs/demo", None),
    ]
    files = {write_token(make_token(), run, port) for run, port in served}
    assert len(files) == len(served)
    assert all(file is not None and file.name.startswith("demo-") for file in files)


def test_the_environments_token_is_taken_and_written_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("KKA_SERVE_TOKEN", "from-the-environment")
    token = make_token()
    assert token.digest == digest("from-the-environment")
    assert write_token(token, Path("runs/demo"), 8000) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("token", ["", "short", "with a space in the middle", "ünïcode-ünïcode-ünïcode"])
def test_tokens_that_can_be_guessed_or_not_sent_are_refused(monkeypatch, token):
    monkeypatch.setenv("KKA_SERVE_TOKEN", token)
    with pytest.raises(ConfigError, match="at least 16") as error:
        make_token()
    assert not token or token not in str(error.value)


@pytest.mark.parametrize(("header", "allowed"), [("bearer abc", True), ("Bearer  abc ", True), ("Token abc", False)])
def test_schemes(header, allowed):
    assert is_authorised(header, digest("abc")) is allowed


def test_starting_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(AssetError, match="holds no detector"):
        start(tmp_path, ServeConfig(), blocking=False)
    (tmp_path / "detector.json").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="choose another --port or --host"):
            start(tmp_path, ServeConfig(port=taken.getsockname()[1]), blocking=False)
    with pytest.raises(ResourceError, match="cannot listen on aaaa.*choose another --port or --host"):
        start(tmp_path, ServeConfig(host="a" * 70), blocking=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    monkeypatch.setattr(serving, "_check_port", lambda config: None)
    with pytest.raises(ConfigError, match=r"onnxruntime .*pip install"):
        start(tmp_path, ServeConfig(engine="onnx"), blocking=False)


def test_a_replica_that_does_not_start_says_why(tmp_path, monkeypatch):
    from ray import serve

    def fail(*_, **__):
        raise RuntimeError("Failed to update the deployments ['DetectorReplica'].")

    monkeypatch.setattr(serving, "_check_room", lambda config: None)
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", fail)
    applications = {}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    (tmp_path / "detector.json").touch()
    with pytest.raises(ResourceError, match="did not start: Failed to update"):
        serving._deploy(tmp_path, ServeConfig(), make_token(), print)
    raised = "The replica failed.\nTraceback (most recent call last):\n  File x\nConfigError: ONNX is not installed\n"
    deployments = {"Ingress": SimpleNamespace(message=""), "DetectorReplica": SimpleNamespace(message=raised)}
    applications["kka"] = SimpleNamespace(deployments=deployments)
    with pytest.raises(ResourceError, match="did not start: ConfigError: ONNX is not installed$"):
        serving._deploy(tmp_path, ServeConfig(), make_token(), print)


NODES = [
    {"NodeID": "a", "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"node:__internal_head__": 1}},
    {"NodeID": "b", "Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": {}},
]


class Here:
    """The context of a process on a node."""

    def __init__(self, node):
        self.get_node_id = lambda: node


@pytest.mark.parametrize(
    ("node", "host", "url", "said"),
    [
        ("a", "127.0.0.1", "http://127.0.0.1:8000", "at http://127.0.0.1:8000; token"),
        ("a", "0.0.0.0", "http://0.0.0.0:8000", "at http://0.0.0.0:8000; token"),
        ("a", "::1", "http://[::1]:8000", "at http://[::1]:8000; token"),
        ("b", "127.0.0.1", "http://127.0.0.1:8000", "head, 10.0.0.1, which no other machine reaches: --host 0.0.0.0"),
        ("b", "0.0.0.0", "http://10.0.0.1:8000", "at http://10.0.0.1:8000; token"),
        ("b", "10.0.0.1", "http://10.0.0.1:8000", "at http://10.0.0.1:8000; token"),
    ],
)
def test_the_address_is_that_of_the_head_on_which_serve_listens(tmp_path, monkeypatch, node, host, url, said):
    from ray import serve

    monkeypatch.setattr(serving, "_check_room", lambda config: None)
    monkeypatch.setattr(ray, "nodes", lambda: NODES[::-1])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Here(node))
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", lambda *_, **__: None)
    heard: list[str] = []
    (tmp_path / "detector.json").touch()
    assert serving._deploy(tmp_path, ServeConfig(host=host), make_token(), heard.append).url == url
    assert said in heard[0]


def test_a_port_that_is_taken_here_may_be_free_on_the_head(tmp_path, monkeypatch):
    from ray import serve

    (tmp_path / "detector.json").touch()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    monkeypatch.setattr(serve, "status", lambda: serve.schema.ServeStatus())
    monkeypatch.setattr(serving, "_deploy", lambda *_: "deployed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServeConfig(port=taken.getsockname()[1])
        monkeypatch.setattr(ray, "get_runtime_context", lambda: Here("b"))
        assert start(tmp_path, config, blocking=False) == "deployed"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: Here("a"))
        with pytest.raises(ResourceError, match="choose another --port"):
            start(tmp_path, config, blocking=False)


def test_replicas_that_no_gpu_has_room_for_are_refused(monkeypatch):
    def cluster(**resources):
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])

    cluster(CPU=8.0, GPU=2.0)
    serving._check_room(ServeConfig(replicas=2, gpus=0.6))
    with pytest.raises(ResourceError, match=r"(?s)service does not fit .*replicas: 3 x .*0.6 GPU.*--replicas"):
        serving._check_room(ServeConfig(replicas=3, gpus=0.6))
    cluster(CPU=1.0)
    with pytest.raises(ResourceError, match="2 x"):
        serving._check_room(ServeConfig(replicas=2))


def test_a_service_that_does_not_start_leaves_nothing_running(tmp_path, monkeypatch):
    from ray import serve

    def fail(*_):
        raise ResourceError("the service did not start")

    (tmp_path / "detector.json").touch()
    ended: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(serving, "_check_cluster", lambda config: None)
    monkeypatch.setattr(serving, "_deploy", fail)
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append(True))
    with pytest.raises(ResourceError, match="did not start"):
        start(tmp_path, ServeConfig(), blocking=False)
    assert ended == [True]


def test_the_token_of_a_running_service_survives_a_start_that_fails(tmp_path, monkeypatch):
    from ray import serve

    def fail(*_, **__):
        raise RuntimeError("no room")

    (tmp_path / "detector.json").touch()
    monkeypatch.setattr(serving, "_check_room", lambda config: None)
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Here(NODES[0]["NodeID"]))
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", lambda *_, **__: None)
    said: list[str] = []
    running = serving._deploy(tmp_path, ServeConfig(), make_token(), said.append)
    assert running.token_file is not None
    assert str(running.token_file) in said[0]
    before = running.token_file.read_text()
    assert before.strip() not in said[0]
    monkeypatch.setattr(serve, "run", fail)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(ResourceError, match="no room"):
        serving._deploy(tmp_path, ServeConfig(), make_token(), said.append)
    assert running.token_file.read_text() == before


def test_serves_own_tools_write_the_token_of_what_can_be_built(tmp_path):
    from serve.app import build

    with pytest.raises(AssetError, match="holds no detector"):
        build({"run": str(tmp_path)})
    assert not (tmp_path / "cache").exists()
    (tmp_path / "detector.json").touch()
    (_, _, expected) = build({"run": str(tmp_path)})._bound_deployment.init_args
    (file,) = (tmp_path / "cache" / "serve").iterdir()
    assert digest(file.read_text().strip()) == expected


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

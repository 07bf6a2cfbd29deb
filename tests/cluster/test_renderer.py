"""Training of a renderer as a user starts it: interrupted, gone on with, finished from a checkpoint."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from kka_ray import assets, tracking
from kka_ray.cli import app
from kka_ray.cluster.renderer import _check_shared, _data, _identity, _share, _Track, finish_renderer, train_renderer
from kka_ray.config.loading import load
from kka_ray.config.models import RenderConfig
from kka_ray.config.renderer import RendererConfig
from kka_ray.data import flowers
from kka_ray.errors import ConfigError, DataError, ResourceError
from kka_ray.render.domain import LEAST
from kka_ray.render.matching import Matcher
from kka_ray.render.renderer import Renderer
from kka_ray.render.training import Settings, Trainer
from tests.render import tiny

CONFIG = """\
name: tiny
sources: [{kind: flowers, count: 256}]
network: {image_size: 32, patch: 8, width: 32, depth: 2, heads: 2, max_text_tokens: 16}
training: {steps: 100000, batch: 4, warmup: 5, decay_from: 1.0, checkpoint_every: 25}
samples: [a red flower, a blue flower]
samples_every: 50
processes: 1
cluster: {train_cpus: 0.5, train_threads: 1}
"""


def kka(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_workers_wait_for_the_images_of_the_first_one_however_long_it_takes(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    config = load(file, RendererConfig, [f"output={tmp_path}", "sources=[{kind: flowers, count: 32}]"])
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            _data(config, tmp_path, 0, "as the first sees them")
        assert len(waited) <= 3, "what the first worker made is not found"

    monkeypatch.setattr("kka_ray.cluster.renderer.time", SimpleNamespace(sleep=sleep))
    other = _data(config, tmp_path, 1, "as the first sees them")
    assert len(waited) == 3
    assert other.identity() == _data(config, tmp_path, 0, "as the first sees them").identity()


def test_workers_that_do_not_fit_the_cluster_are_refused(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    monkeypatch.setattr("kka_ray.cluster.renderer.session", lambda _: nullcontext())
    monkeypatch.setattr("kka_ray.cluster.renderer.nodes", lambda: [{"CPU": 8.0}])
    monkeypatch.setattr("kka_ray.cluster.renderer.train.run", lambda *_: pytest.fail("it waits for a GPU"))
    config = load(file, RendererConfig, [f"output={tmp_path}", "cluster.train_gpus=1", "workers=2"])
    with pytest.raises(ResourceError, match=r"(?s)training does not fit .*workers: 2 x .*1 GPU.*cluster\.train_gpus"):
        train_renderer(config, lambda _: None)


def test_workers_find_the_driver_s_mark_in_its_folder_alone(tmp_path: Path, monkeypatch) -> None:
    """A worker whose node has a disk of its own would train for itself, or wait for images that never come."""
    file, elsewhere, now = tmp_path / "tiny.yaml", tmp_path / "elsewhere", 0.0
    file.write_text(CONFIG)
    (elsewhere / "tiny").mkdir(parents=True)
    (elsewhere / "tiny" / ".driver").write_text("of an earlier training")

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def run(name: str, function: Any, arguments: dict[str, Any], *_: Any) -> None:
        folder, mark = Path(arguments["folder"]), arguments["mark"]
        _check_shared(folder, mark)
        assert now == 0
        with pytest.raises(ConfigError, match="is not the driver's folder on this node: .*-o output=/shared/elsewhere"):
            function({**arguments, "folder": str(elsewhere / "tiny")})
        assert now == pytest.approx(60, abs=2)
        raise InterruptedError

    monkeypatch.setattr("kka_ray.cluster.renderer.time", SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    monkeypatch.setattr("kka_ray.cluster.renderer.session", lambda _: nullcontext())
    monkeypatch.setattr("kka_ray.cluster.renderer.nodes", lambda: [{"CPU": 8.0}])
    monkeypatch.setattr("kka_ray.cluster.renderer.train.run", run)
    with pytest.raises(InterruptedError):
        train_renderer(load(file, RendererConfig, [f"output={tmp_path / 'here'}"]), lambda _: None)
    assert [f.name for f in (tmp_path / "here" / "tiny").iterdir()] == ["config.yaml"]


def test_a_mark_that_shared_storage_shows_late_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    seen = SimpleNamespace(sleep=lambda _: (tmp_path / ".driver").write_text("mark"), monotonic=lambda: 0.0)
    monkeypatch.setattr("kka_ray.cluster.renderer.time", seen)
    _check_shared(tmp_path, "mark")


def test_a_folder_with_a_checkpoint_of_another_training_is_left_as_it_is(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)

    def config(*overrides: str) -> RendererConfig:
        return load(file, RendererConfig, [f"output={tmp_path}", *overrides])

    def reached(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr("kka_ray.cluster.renderer.session", reached)
    folder = tmp_path / "tiny"
    learner = Trainer(tiny.flow_transformer(), Settings(steps=1), identity=_identity(config()))
    learner.save(folder / "checkpoint")
    (folder / "config.yaml").write_text("as it was")
    more = "sources=[{kind: flowers, count: 256}, {kind: flowers, count: 8, seed: 1}]"
    for change, said in [
        ("training.batch=8", "training.batch was 4 and is 8"),
        ("network.width=64", "network.width was 32 and is 64"),
        ("start=builtin:flowers", "start differs"),
        ("training.perceptual={weight: 0.1}", "perceptual differs"),
        (more, "sources differs"),
    ]:
        with pytest.raises(ConfigError, match=said):
            train_renderer(config(change), lambda _: None)
        assert (folder / "config.yaml").read_text() == "as it was"
    for change in ("training.steps=9", "training.ema=0.5", "training.decay_from=0.5", "samples_every=7", "workers=2"):
        with pytest.raises(InterruptedError):
            train_renderer(config(change), lambda _: None)


def test_a_checkpoint_is_not_finished_with_other_steps_in_the_same_folder(tmp_path: Path, monkeypatch) -> None:
    """What is there has left the plateau: more steps would begin far from it, and fewer would be none."""

    def reached(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr("kka_ray.cluster.renderer.session", reached)
    file, folder = tmp_path / "tiny.yaml", tmp_path / "tiny"
    file.write_text(CONFIG)
    config = load(file, RendererConfig, [f"output={tmp_path}"])
    learner = Trainer(tiny.flow_transformer(), Settings(steps=1), identity=_identity(config))
    learner.step = 30
    learner.save(folder / "checkpoint")
    (folder / "data.safetensors").touch()
    for steps in (20, 20):  # begun, and gone on with
        with pytest.raises(InterruptedError):
            finish_renderer(config, steps, lambda _: None)
    before = (tmp_path / "tiny-30" / "config.yaml").read_text()
    for steps in (10, 40):
        with pytest.raises(ConfigError, match=rf"tiny-30 was begun with --steps 20, not {steps}"):
            finish_renderer(config, steps, lambda _: None)
    assert (tmp_path / "tiny-30" / "config.yaml").read_text() == before


def test_a_checkpoint_is_copied_where_there_are_no_hard_links(tmp_path: Path, monkeypatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def full(source: Path, target: Path) -> None:
        target.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kka_ray.cluster.renderer.os.link", refused)
    source, target = tmp_path / "data.safetensors", tmp_path / "tiny-30" / "data.safetensors"
    source.write_text("all of it")
    with monkeypatch.context() as patched:
        patched.setattr("kka_ray.cluster.renderer.shutil.copyfile", full)
        with pytest.raises(ResourceError, match=r"data\.safetensors cannot be copied to .*tiny-30: .*No space left"):
            _share(source, target)
    assert list(target.parent.iterdir()) == []
    _share(source, target)
    assert target.read_text() == "all of it"
    assert not target.samefile(source)


def test_workers_track_where_the_driver_would(tmp_path: Path, monkeypatch) -> None:
    """Their current folder is another, and a new one each time."""
    seen: list[RendererConfig] = []

    def run(name: str, function: Any, arguments: dict[str, Any], *_: Any) -> None:
        seen.append(arguments["config"])
        pipeline = Path(arguments["folder"], "pipeline")
        pipeline.mkdir()
        (pipeline / "model_index.json").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kka_ray.cluster.renderer.session", lambda _: nullcontext())
    monkeypatch.setattr("kka_ray.cluster.renderer.nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr("kka_ray.cluster.renderer.train.run", run)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    overrides = ["output=.", "data=images", "tracking.uri=sqlite:///db/mlflow.db"]
    train_renderer(load(tmp_path / "tiny.yaml", RendererConfig, overrides), lambda _: None)
    assert seen[0].data == str(tmp_path / "images")
    assert seen[0].tracking.uri == f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    train_renderer(load(tmp_path / "tiny.yaml", RendererConfig, ["output=~/out", "data=~/images"]), lambda _: None)
    assert seen[1].data == str(tmp_path / "home" / "images")
    assert not (tmp_path / "~").exists()


def test_the_log_of_a_training_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    """It goes on from its last checkpoint, and may have got further than that."""
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    config, log = load(file, RendererConfig, [f"output={tmp_path}"]), tmp_path / "training.jsonl"
    killed = _Track(config, tmp_path)
    for step in (50, 100, 150):
        killed.metrics({"step": step, "loss": 1.0})
    with log.open("a") as stream:
        stream.write('{"step": 20')  # half a line
    again = _Track(config, tmp_path)
    for step in (100, 150):
        again.metrics({"step": step, "loss": 2.0})
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert rows == [{"step": 50, "loss": 1.0}, {"step": 100, "loss": 2.0}, {"step": 150, "loss": 2.0}]


def test_a_folder_that_is_not_there_is_said_before_anything_is_made(tmp_path: Path) -> None:
    file = tmp_path / "folder.yaml"
    source = {"kind": "data", "data": {"kind": "folder", "path": ".", "description": "a screw"}}
    file.write_text(yaml.safe_dump(yaml.safe_load(CONFIG) | {"sources": [source]}))
    with pytest.raises(DataError, match=r"nowhere, which is no folder; name .* -o data=DIR"):
        train_renderer(
            load(file, RendererConfig, [f"output={tmp_path / 'out'}", f"data={tmp_path / 'nowhere'}"]), print
        )
    assert not (tmp_path / "out").exists()


def test_too_few_images_are_refused_before_the_training(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.replace("count: 256", f"count: {LEAST - 1}"))
    with pytest.raises(DataError, match=f"at least {LEAST} images, the sources hold {LEAST - 1}"):
        _data(load(file, RendererConfig, [f"output={tmp_path}"]), tmp_path, 0, "")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(assets.is_present, ("builtin:minilm-l6-v2", "builtin:efficientnet-lite0"))),
    reason="the built-in models are missing: run `kka setup`",
)
def test_a_training_goes_on_and_is_finished_from_its_checkpoint(tmp_path: Path) -> None:
    file, output = tmp_path / "tiny.yaml", tmp_path / "renderers"
    file.write_text(CONFIG)
    train = ["renderer", "train", file, "-o", f"output={output}"]
    kka(*train, "-o", "training.steps=50", "-o", "workers=2")
    kka(*train, "-o", "training.steps=100")
    folder = output / "tiny"
    steps = [json.loads(line)["step"] for line in (folder / "training.jsonl").read_text().splitlines()]
    assert steps == [50, 100]
    grids = [Image.open(path) for path in sorted((folder / "samples").iterdir())]
    assert [grid.size for grid in grids] == [(8 * 32, 2 * 32)] * 2
    assert grids[0].tobytes() != grids[1].tobytes()

    client = MlflowClient(tracking.default_uri(output))
    run = (folder / "mlflow_run").read_text()
    assert [m.step for m in client.get_metric_history(run, "loss")] == [50, 100]
    assert len(client.list_artifacts(run, "samples")) == 2
    assert client.get_run(run).info.status == "FINISHED"

    checkpoint = (folder / "checkpoint" / "training.safetensors").read_bytes()
    kka("renderer", "finish", file, "--steps", 25, "-o", f"output={output}")
    assert (folder / "checkpoint" / "training.safetensors").read_bytes() == checkpoint
    finished = output / "tiny-100"
    assert int(load_file(finished / "checkpoint" / "training.safetensors")["step"]) == 125
    pipeline = str(finished / "pipeline")
    image = Renderer.load(RenderConfig(pipeline=pipeline, steps=2)).draw(["a red flower"], [0])[0]
    assert isinstance(image, np.ndarray)
    assert image.shape == (32, 32, 3)

    # A new training begins with the weights of the finished one.
    still = "training={steps: 1, batch: 4, warmup: 0, learning_rate: 1.0e-9, matrix_rate: 1.0e-9}"
    kka(*train, "-o", "name=next", "-o", f"start={pipeline}", "-o", still)
    following = output / "next" / "pipeline"
    before, after = (load_file(next(Path(p).glob("transformer/*.safetensors"))) for p in (pipeline, following))
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)
    assert "trained from " + pipeline in (following / "README.md").read_text()

    # The same images match their own texts better than others' in the space that was learned beside the network.
    drawn = flowers.make_renderer_data(64, seed=5)
    photographs, texts = [d.image for d in drawn], [d.caption for d in drawn]
    matcher = Matcher.load(pipeline)
    own, others = matcher.match(photographs, texts), matcher.match(photographs, texts[1:] + texts[:1])
    assert np.median(own) > np.median(others) + 0.1

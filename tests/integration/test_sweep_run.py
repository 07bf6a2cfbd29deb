"""A whole sweep on a local cluster with the real small models."""

import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.integration.tiny_run import TINY, finish, kka, models_are_missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`"),
]

_RUN = {k: v for k, v in TINY.items() if k != "name"}
# More lines, a wider band and more normals than the tiny run, as trials are measured with hard images and with half of
# the drawn normals; and few fits.
_WIDER = {"confusion": {**TINY["confusion"], "lower_quantile": 0.5}, "loop": {**TINY["loop"], "lines": 32}}
_WIDER |= {"render": {**TINY["render"], "normals": 12}}
_WIDER |= {"detect": {**TINY["detect"], "detectors": [{"kind": "fused"}], "controls": [], "views": 0}}
SWEEP = {
    "name": "tiny",
    "run": _RUN | _WIDER,
    "parameters": {"loop.rounds": {"grid": [0, 1]}, "preference.beta": {"grid": [0.1]}},
    "concurrency": 1,
}


def test_a_sweep_runs_its_trials_and_its_champion_and_shares_what_they_have_in_common(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    output = finish(kka(tmp_path, "sweep", "sweep.yaml"))

    assert "trial 0 (loop.rounds=0, preference.beta=0.1): " in output
    assert "best: loop.rounds=" in output
    assert "Configuration for experiment" not in output
    assert "kka-tune-" not in output
    found = json.loads((tmp_path / "runs" / "tiny" / "sweep.json").read_text())
    zeroth, trained = found["trials"]
    assert all(0 <= t["objective"] <= 1 and t["error"] is None for t in (zeroth, trained))
    assert found["best"] == (1 if trained["objective"] > zeroth["objective"] else 0)
    assert trained["rounds"] == ["ok", "ok"]
    assert trained["made"]["dpo"] == 1
    assert trained["found"]["sample"] == zeroth["made"].get("sample", 0) + zeroth["found"].get("sample", 0)
    champion = json.loads((tmp_path / "runs" / found["champion"]["name"] / "summary.json").read_text())
    assert champion["auc"]["kka"]["per_seed"]

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "kka"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    aucs = {r.data.metrics["validation_auc"] for r in children if "validation_auc" in r.data.metrics}
    assert aucs == {t["objective"] for t in found["trials"]}
    assert {r.info.status for r in runs} == {"FINISHED"}

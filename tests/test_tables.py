import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kka_ray.detectors.tuned import VERSION
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_script(ROOT / "benchmarks" / "tables.py")


def test_the_tables_of_the_results_are_those_of_the_measurements() -> None:
    """What the document says comes from the committed JSON, to the last digit."""
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _row(detector: str, auc: float, source: str = "none", seed: int = 0) -> dict[str, object]:
    row = {"data": "cifar100_furniture", "detector": detector, "source": source, "count": 0, "seed": seed}
    return {**row, "auc": auc, "fit_seconds": 1.0, "ms_per_image": 1.0, "version": VERSION}


def test_detectors_of_an_earlier_version_are_named(tables: ModuleType) -> None:
    rows = [_row("knn", 0.9), _row("head", 0.9) | {"version": VERSION - 1}]
    assert "earlier version of the detectors (`version` in the JSON): `head`.\n" in tables.detectors({"rows": rows})
    assert "earlier version" not in tables.detectors({"rows": rows[:1]})


def test_the_distance_of_simplenet_at_32_px_from_the_paper_is_computed(tables: ModuleType) -> None:
    rows = [
        *(_row("simplenet_pixels", auc, seed=seed) for seed, auc in enumerate((0.70, 0.72))),
        _row("simplenet_pixels", 0.99, source="noise"),
        _row("ae_svdd (32 px)", 0.6),
        _row("knn", 0.94),
    ]
    names = {"ae_svdd": "ae_svdd (32 px)", "beatgan": "beatgan", "simplenet_pixels": "simplenet_pixels"}
    text = tables.detectors({"at_32px": names, "rows": rows})
    assert "`configs/detectors_32px.yaml`: `ae_svdd (32 px)`, `simplenet_pixels`." in text
    assert "0.7100 ± 0.0141 on CIFAR-100 furniture, 3.6 points below the 0.7462" in text
    above = tables.detectors({"at_32px": names, "rows": [_row("simplenet_pixels", 0.7562)]})
    assert "1.0 points above the 0.7462" in above
    assert "paper" not in tables.detectors({"rows": rows})


def test_simplenet_is_held_against_knn_on_each_data_set(tables: ModuleType) -> None:
    rows = [
        *(_row("simplenet", auc, seed=seed) for seed, auc in enumerate((0.70, 0.72))),
        _row("simplenet", 0.99, source="noise"),
        *(_row("knn", auc, seed=seed) for seed, auc in enumerate((0.72, 0.73))),
        {**_row("knn", 0.9), "data": "ucm_captions"},
    ]
    assert "fitted to normals only: cifar100_furniture -0.0150.\n" in tables.detectors({"rows": rows})
    assert "less k-NN" not in tables.detectors({"rows": rows[:2]})


def test_spreads_of_the_renderer_are_shown_where_they_were_measured(tables: ModuleType) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "renderer.json").read_text())
    more = {"fidelity_seeds": 3, "class_top1_std": 0.0123, "unseen_gain_ratio": 0.6, "unseen_gain_ratio_std": 0.1}
    text = tables.renderer(result | {"class_top1": 0.25} | more)
    assert "5 seeds (fidelity: 3)" in text
    assert "top-1 | 0.2500 ± 0.0123 |" in text
    assert "| 0.6000 ± 0.1000 |" in text
    assert "\nMeasured before versions were noted with it.\n" in text
    now = {"made_with": {"renderer": next(iter(tables._shipped())), "detectors": tables.tuned.VERSION}}
    assert "\nMeasured" not in tables.renderer(result | now)
    old = {"made_with": {"renderer": "before", "detectors": tables.tuned.VERSION}}
    assert "\nMeasured with earlier weights of the renderer.\n" in tables.renderer(result | old)


def test_a_check_that_no_seed_could_measure_is_said_to_be_not_measured(tables: ModuleType) -> None:
    """As where no seed kept an image."""
    none = {"mean": None, "std": None, "per_seed": [None, None]}
    some = {"mean": 0.9, "std": 0.0, "per_seed": [None, 0.9]}
    checks = {"KKA minus zero-th": none | {"low": 0.0, "wanted": "> 0", "passed": False}}
    text = tables.demo({"seeds": 2, "checks": checks, "auc": {"simplenet": {"baseline": some}}, "runs": [{}, {}]})
    assert "| KKA minus zero-th | not measured | > 0 | **no** |" in text
    assert "| simplenet | 0.9000 ± 0.0000 in 1 of 2 seeds |" in text
    assert "loop.\n\nMeasured with earlier weights of the renderer and versions of the detectors.\n\n| measure" in text


def test_the_overview_says_which_of_its_rows_are_old(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_shipped", lambda: {"now"})
    case = {"normals": 1250, "detectors": {"knn": {"baseline": {"mean": 0.9}}}, "rounds": [{"hard_rate": 0.25}] * 2}
    new, old = ({"renderer": r, "detectors": tables.tuned.VERSION} for r in ("now", "before"))
    text = tables.overview({"oxford102": case | {"made_with": new}, "folder": case | {"made_with": old}})
    assert "| Oxford-102, poppies | 1,250 | 0.900 |" in text
    assert text.endswith("\nmagnetic tiles, as a folder: measured with earlier weights of the renderer.\n")
    assert text.count("measured with") == 1

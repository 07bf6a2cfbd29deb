"""A whole run whose descriptions come from an API."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.describe.completions_server import completions_server
from tests.integration.tiny_run import finish, models_are_missing, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`"),
]


def test_a_run_with_an_api_counts_its_cost_and_asks_nothing_twice(tmp_path: Path) -> None:
    colours = ("red", "blue", "green", "purple", "orange", "black", "white", "golden")
    with completions_server() as service:
        service.lines = [f"a {c} {thing} with many stripes" for c in colours for thing in ("bicycle", "orchid")]
        sampler = f"{{kind: api, base_url: '{service.url}', model: m, prompt_price: 1, completion_price: 2}}"
        overrides = (f"describe.sampler={sampler}", "loop.rounds=0")
        finish(start(tmp_path, *overrides))
        asked = len(service.asked)
        first = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
        finish(start(tmp_path, *overrides))
        again = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert len(service.asked) == asked
    assert again["api"] == first["api"]
    api = first["api"]
    assert api["requests"] == asked
    assert api["cost"] == pytest.approx((api["prompt_tokens"] + 2 * api["completion_tokens"]) / 1e6)
    assert first["rounds"][0]["perplexity"] is None
    lines = pq.read_table(tmp_path / "runs" / "tiny" / "records" / "descriptions.parquet").to_pandas()
    assert len(lines) == 16
    assert (lines.status == "ok").any()

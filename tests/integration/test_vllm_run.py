"""A whole run, one round of DPO included, with vLLM; and what holds of it after a kill: no row is made twice."""

import json
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.tiny_run import finish, models_are_missing, start
from tests.needs import VLLM

pytestmark = [
    *VLLM,
    pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`"),
]
OVERRIDES = (
    "describe.sampler={kind: vllm, dtype: bfloat16, kv_cache_gib: 0.25, max_model_len: 512}",
    # vLLM does not repeat itself: with these no draw of lines is without a pair.
    "loop.lines=32",
    "confusion.upper=1000",
    "preference.rejected=[easy, normal_like, guarded]",
)


def test_a_killed_run_goes_on_and_keeps_every_row_that_was_committed(tmp_path: Path) -> None:
    store = tmp_path / "runs" / "store"
    process = start(tmp_path, *OVERRIDES)
    deadline = time.monotonic() + 400
    while not list(store.glob("sample/*/committed.json")):
        assert time.monotonic() < deadline, "no line was ever committed"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.read_bytes() for p in store.glob("sample/*/committed.json")}
    finish(start(tmp_path, *OVERRIDES))
    after = {p: p.read_bytes() for p in store.glob("sample/*/committed.json")}
    assert before.items() <= after.items()
    assert len(after) == 8, "four chunks a round, none made twice under another key"

    folder = tmp_path / "runs" / "tiny"
    rounds = json.loads((folder / "summary.json").read_text())["rounds"]
    assert [r["described"] for r in rounds] == [32, 32]
    assert [r["status"] for r in rounds] == ["ok", "ok"]
    assert rounds[1]["dpo"]["steps"] == 1
    assert all(1 < r["perplexity"] < 1000 for r in rounds)
    descriptions = pq.read_table(folder / "records" / "descriptions.parquet").to_pandas()
    assert len(descriptions) == 64
    assert descriptions.id.is_unique

"""The API sampler against a real service: vLLM's own OpenAI-compatible server, on localhost and with a key."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from kka_ray import assets
from kka_ray.config.models import ApiSampler, DescribeConfig, TransformersSampler
from kka_ray.describe.api_sampler import ApiEngine
from kka_ray.describe.transformers_sampler import TransformersEngine
from kka_ray.errors import StageError
from tests.needs import VLLM

MODEL = "builtin:smollm2-135m-instruct"
PROMPTS = ["A list of flowers:\n- a white flower\n- a pink flower\n-", "A list of flowers:\n- a yellow tulip\n-"]
LINES = [" a red flower with seven long petals\n", " a blue car in the street\n"]

pytestmark = [
    *VLLM,
    pytest.mark.skipif(not assets.is_present(MODEL), reason="the built-in models are missing: run `kka setup`"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(assets.resolve(MODEL).path), "--served-model-name", "smollm2", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]
    environment = os.environ | {
        "VLLM_API_KEY": "test-key",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
    }
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"the server did not start: {log.read_text()[-3000:]}"
        try:
            if httpx2.get(address).is_success:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.5)


def engine(url: str) -> ApiEngine:
    sampler = ApiSampler(kind="api", base_url=url, model="smollm2", key_variable="KKA_TEST_KEY", echo=True)
    return ApiEngine(DescribeConfig(sampler=sampler, max_tokens=12))


def test_lines_are_written_and_counted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KKA_TEST_KEY", "test-key")
    api = engine(url)
    written = api.sample(PROMPTS, 4, seed=1)
    assert [len(lines) for lines in written] == [4, 4]
    assert all(line.count("\n") == line.endswith("\n") for lines in written for line in lines)
    usage = api.take_usage()
    assert usage["requests"] == 2
    assert 8 <= usage["completion_tokens"] <= 8 * 12
    assert usage["prompt_tokens"] > 20


def test_log_probabilities_are_those_of_transformers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KKA_TEST_KEY", "test-key")
    own = TransformersEngine(DescribeConfig(sampler=TransformersSampler(dtype="float32")))
    found, wanted = engine(url).log_probs(PROMPTS, LINES), own.log_probs(PROMPTS, LINES)
    for one, other in zip(found, wanted, strict=True):
        assert np.allclose(one, other, atol=0.02)


def test_a_wrong_key_is_refused_and_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KKA_TEST_KEY", "wrong-key")
    with pytest.raises(StageError, match="HTTP 401") as error:
        engine(url).sample(PROMPTS, 1, seed=0)
    assert "wrong-key" not in str(error.value)

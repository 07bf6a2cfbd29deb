"""What some tests need and a machine may lack."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

VLLM = (
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: run `make test-vllm`"),
)

"""For all tests."""

import os

# A call of Ray's without a cluster would start one that is never ended, or join whichever it finds.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import kka_ray.cluster  # noqa: F401  sets what Ray reads from the environment, before any test imports Ray

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)  # a process for each processor: threads beyond them wait for each other

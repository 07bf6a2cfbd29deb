"""For all tests."""

import kka_ray.cluster  # noqa: F401  sets what Ray reads from the environment, before any test imports Ray

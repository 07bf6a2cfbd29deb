"""Everything Ray: the session, the resource plan, pools of actors, Ray Train launchers.

Ray reads its environment as it is imported, so what a run relies on is set here, ahead of any import of ray below.
"""

import os

# A cluster without authentication would run anybody's code.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# Usage statistics would ask the network.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# An actor without GPUs keeps the CUDA variables it inherits (Ray's coming default).
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

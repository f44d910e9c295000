"""Settings for all tests: no test has a time limit, and torch uses one thread."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("ckptkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ckptkit")

# Small models are slower with several threads, and the tests run in parallel already.
os.environ.setdefault("OMP_NUM_THREADS", "1")

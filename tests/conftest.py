"""What holds for every test: none fails because the machine is busy, or waits for threads that it does not need."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("ckptkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ckptkit")

# Models this small wait longer for each other's threads than they compute; the tests themselves share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

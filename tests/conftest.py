"""Settings for all tests: no time limit, one thread of torch, and named parameters for the optimizers of any torch."""

from __future__ import annotations

import gc
import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile("ckptkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ckptkit")

# Small models are slower with several threads, and the tests run in parallel already. torch reads it when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Workers of parallel tests inherit a width of the terminal, and pages would be fitted into it.
os.environ.pop("COLUMNS", None)
# A shell lets commands in the background ignore Ctrl-C, and some tests interrupt themselves or a process of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup leaves it to its commands

from tests.features import accept_names  # noqa: E402

accept_names()

gc.disable()  # while ten thousand tests are collected, which are no garbage: it took a third of that time


def pytest_collection_finish() -> None:
    """Collect garbage again, but never look at the tests and the modules for it."""
    gc.freeze()
    gc.enable()

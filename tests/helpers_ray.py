"""What workers of Ray run in tests, in a module that they import quickly."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")  # of cgroup v1; root can make groups with a limit
LIMIT = 64 << 20


def killed_once_for_memory(group: str, mark: str, function: Callable[..., Any], *task: Any) -> Any:
    """Do a task; the first worker of all takes more memory than its group has, and the kernel kills it."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return function(*task)
    Path(group, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    return len(bytearray(4 * LIMIT))


def slowly(seconds: float, begun: str, function: Callable[..., Any], *task: Any) -> Any:
    """Do a task after some seconds, in which a test can end its node; leave a file that names the node."""
    import ray

    tempfile.mkstemp(prefix=ray.get_runtime_context().get_node_id(), dir=begun)
    time.sleep(seconds)
    return function(*task)

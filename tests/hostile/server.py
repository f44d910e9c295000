"""A process that has imported the package, and runs each command of ``ckpt`` in a copy of itself."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import socket
import sys

import ckptkit

__all__ = ["serve"]


def serve(requests: socket.socket) -> None:
    """Fork for each request until the other end is closed, and answer with the exit status.

    A request is a JSON object, and the two files that become stdout and stderr.
    """
    for module in pkgutil.walk_packages(ckptkit.__path__, "ckptkit."):
        if not module.name.startswith(("ckptkit.__main__", "ckptkit.integrations.")):  # these run, or load torch
            importlib.import_module(module.name)
    gc.freeze()
    while True:
        message, streams, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            return
        child = os.fork()
        if child == 0:
            requests.close()
            _become(streams, **json.loads(message))
        for stream in streams:
            os.close(stream)
        requests.send(str(os.waitpid(child, 0)[1]).encode())


def _become(streams: list[int], arguments: list[str], cwd: str, umask: int, limits: dict[str, int]) -> None:
    """Be what ``python -m ckptkit`` is, under these limits."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = (os.fdopen(end, "w", encoding="utf-8", closefd=False) for end in (1, 2))
    os.chdir(cwd)
    os.umask(umask)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv = ["ckpt", *arguments]
    runpy.run_module("ckptkit", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

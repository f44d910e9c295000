"""The class ``concurrent.futures.Executor`` for annotations, so that a module can name it without importing it.

A type checker sees the class. At run time the name is an annotation that imports the class when
``typing.get_type_hints`` reads it, and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from ckptkit.core.arguments import require_type

if TYPE_CHECKING:
    from concurrent.futures import Executor
else:
    Executor = Annotated["__import__('concurrent.futures').futures.Executor", "concurrent.futures"]

__all__ = ["Executor", "require_executor"]


def require_executor(value: object) -> None:
    """Raise ``ArgumentError`` unless the argument ``executor`` is None, or an executor."""
    if value is not None:
        from concurrent import futures

        require_type(value, futures.Executor, "executor", "an Executor of concurrent.futures")

"""torch's classes for annotations, so that a module can name them without importing torch.

A type checker sees the classes. At run time each name is an annotation that imports torch when
``typing.get_type_hints`` reads it, and not before. A function that needs the class itself imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as DType  # noqa: N812 - a class, named as one
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer
else:
    DType = Annotated["__import__('torch').dtype", "torch"]
    Module = Annotated["__import__('torch').nn.Module", "torch"]
    Optimizer = Annotated["__import__('torch').optim.Optimizer", "torch"]
    Parameter = Annotated["__import__('torch').nn.Parameter", "torch"]
    Tensor = Annotated["__import__('torch').Tensor", "torch"]

__all__ = ["DType", "Module", "Optimizer", "Parameter", "Tensor"]

"""Recognise the states with which a pickle changes a tensor after building it; torch follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ckptkit.formats.pickle.values import Placeholder

__all__ = ["changing_attribute", "is_autograd_state"]

# Everything that torch.Tensor defines as an attribute with a setter, in any version of torch. Any other name becomes
# a plain attribute of the Python object, which changes no value.
_CHANGING: Final = frozenset({
    "data", "real", "imag", "names", "shape", "dtype", "device", "layout", "grad_fn", "volatile", "grad_dtype",
    "T", "H", "mT", "mH", "name", "nbytes", "itemsize", "ndim", "is_leaf", "output_nr", "retains_grad", "is_meta",
    "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_mkldnn", "is_cpu", "is_cuda", "is_ipu", "is_maia",
    "is_mps", "is_mtia", "is_ort", "is_vulkan", "is_xla", "is_xpu", "is_hpu", "_base", "_cdata", "_grad_fn",
    "_has_symbolic_sizes_strides", "_post_accumulate_grad_hooks", "_python_dispatch", "_version",
    "__class__", "__dict__", "__weakref__", "__cuda_array_interface__",
})  # fmt: skip
_AUTOGRAD_PARTS = 3  # requires_grad, volatile and the hooks, as torch before 0.4 gave them to a parameter


def changing_attribute(state: object, is_same: Callable[[object], bool]) -> str:
    """Return the first attribute with which ``state`` changes a tensor, or "" if the tensor stays as it is.

    ``state`` is the state of the Python object: a dict, or the dict and the slots. ``is_same`` returns whether a value
    is the same view as the tensor: some subclasses of parameters store their own values a second time, as ``data``.
    """
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, Placeholder):
            return "__dict__"
        if isinstance(part, dict):
            for name, value in part.items():
                if name in _CHANGING and not (name == "data" and is_same(value)):
                    return str(name)
    return ""


def is_autograd_state(state: object) -> bool:
    """Return whether the state of a tensor says only whether it requires gradients, as before torch 0.4."""
    return isinstance(state, tuple) and len(state) == _AUTOGRAD_PARTS and isinstance(state[0], bool)

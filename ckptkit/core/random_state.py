"""Run code of the user without a trace in the random number generators."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

__all__ = ["NEW_MODEL_SEED", "restored_random_state"]

# For a new model that a checkpoint is compared with. No training script has this seed: the weights of its own first
# model would be equal, and not like those of a new model.
NEW_MODEL_SEED = 3_141_592_653


@contextlib.contextmanager
def restored_random_state(*, seed: int | None = None) -> Iterator[None]:
    """Restore the random number generators of Python, torch and, where it is imported, of numpy at the end of a block.

    With ``seed``, an int below 2**32, the block draws the same numbers in every run. The generators of GPUs count where
    torch uses them already.

    Example:
        >>> with restored_random_state(seed=1):
        ...     first = torch.rand(2)
        >>> with restored_random_state(seed=1):
        ...     torch.equal(torch.rand(2), first)
        True
    """
    import torch

    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    # A first use of CUDA would be slow, and so would a seed that waits for it.
    is_on_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if is_on_gpu else range(0)
    try:
        with torch.random.fork_rng(list(devices)):
            if seed is not None:
                random.seed(seed)
                torch.default_generator.manual_seed(seed)
                for device in devices:
                    torch.cuda.default_generators[device].manual_seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed)
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

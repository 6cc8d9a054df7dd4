"""Host floats as factors of tensors, at the price of the multiplication alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Factor = Callable[[Any], Any]  # a float -> what a tensor is multiplied by in its place
_transformed = torch._C._are_functorch_transforms_active  # torch.func's grad, vmap and the like wrap what is made inside them


def factors(x: Tensor) -> Factor:
    """What stands for a float in products with tensors such as x.

    torch makes a 0-d tensor of a Python float at every product: 2.5 of the 5.6 us that one takes at (4, 3, 32, 32). On a CPU they
    are kept instead, one a float, where that changes neither bits (float32; but the sign of a product with zero) nor what a
    compiler, a tracer, a transform or a subclass of Tensor sees.
    """
    plain = type(x) is Tensor and x.is_cpu and x.dtype == torch.float32
    return _kept if plain and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed()) else itself


def itself(w: Any) -> Any:
    return w


@lru_cache(maxsize=2**14)
def _kept(w: float) -> Tensor:
    with torch.inference_mode(False):  # what is made inside could not be saved for a backward pass outside
        return torch.tensor(w, dtype=torch.float32, device="cpu")

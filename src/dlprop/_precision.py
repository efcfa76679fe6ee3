"""The one place that knows autocast, float32 and TF32: norms, sums and products are computed in at least float32."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def exact(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not lower the precision of products on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is in half precision, otherwise ``x`` itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in with ``tensors``, which differ in theirs under autocast only."""
    return reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums that are small and many are added to: float64 on devices that have it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def allows_tf32() -> bool:
    """Whether torch's own float32 products on CUDA may have the 11 bits of TF32."""
    # The newer of torch's two settings first: once it has been used, reading the older one may raise.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else bool(setting == "tf32")

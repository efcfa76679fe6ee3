"""The one place that knows autocast and torch's settings for float32 products.

Norms, sums and, unless such a setting allows less, products are computed in at least float32.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

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
    return _of_products(torch.backends.cuda) in ("tf32", "bf16")


def bfloat16_pieces(x: Tensor) -> int:
    """How many bfloat16 numbers may stand for a float32 in products on the device of ``x``; 0: it stays as it is.

    "medium" allows one, on CPUs where torch takes it for its own products too. "high" allows two, which have 16 bits,
    where the processor multiplies tiles of matrices: elsewhere three products of pieces take longer than one whole.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return 0
    setting = _of_products(torch.backends.mkldnn)
    if setting == "bf16":
        return int(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return 2 if setting == "tf32" and torch.cpu._is_amx_tile_supported() else 0


def _of_products(backend: Any) -> str:
    """Torch's setting for float32 products of ``backend``, in its newer words: "bf16", "tf32", or exact ones."""
    # The newer of torch's two settings first: once it has been used, reading the older one may raise.
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    older = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
    return older[torch.get_float32_matmul_precision()] if setting is None else str(setting)

"""The momentum network: a running average of a model's weights."""

from collections.abc import Callable
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import _checks

__all__ = ["MomentumAverager"]

Buffers = Literal["average", "copy", "none"]


class MomentumAverager(AveragedModel):
    r"""A frozen copy of a model that follows it with momentum: `Theta_m <- m Theta_m + (1 - m) Theta_b`.

    The first update copies. Call `update` after each epoch (the paper's Eq. 6, with momentum 0.5) or after each step
    (then for instance momentum 0.996). The copy, `.module`, needs no gradient and stays in eval mode, whatever
    `train()` of the averager, or of what holds it, is told; calling the averager calls it. It is a
    `torch.optim.swa_utils.AveragedModel`, and whatever takes one takes it:
    `torch.optim.swa_utils.update_bn(loader, averager)` refills the statistics of its BatchNorm layers, which are in
    train mode then and only then (those of layers made with `momentum=None` it resets instead).

    The average has the dtype of `model` at construction. In half precision small steps round away, so build it from
    the float32 model and cast the model afterwards; updates convert.

    Args:
        model: the module to follow; DistributedDataParallel, DataParallel and `torch.compile` wrappers are removed.
        momentum: weight `m` of the old average in [0, 1], or a callable from the number of updates already made to it,
            1 or more.
        buffers: what to do with floating buffers such as BatchNorm's statistics: "average" them, "copy" them, or
            leave them ("none"; recompute them with `update_bn(loader, averager)`). Other buffers, such as
            counters, are always copied.

    Raises:
        TypeError: `model` is no Module, or `momentum` neither number nor callable.
        ValueError: `momentum` outside [0, 1], an unknown `buffers`, or in `update` a model whose parameters or buffers
            differ from the averaged ones in name or shape: the error names the first, and nothing is changed.

    Cost:
        One fused pass over the weights for each dtype and device; memory of one more model.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> averager = MomentumAverager(model)
        >>> averager.update(model)  # the first update copies
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> averager.update(model)
        >>> averager.module.weight.item()
        2.0

    Reference:
        DerProp, Eq. 6.
    """

    def __init__(
        self, model: nn.Module, momentum: float | Callable[[int], float] = 0.5, *, buffers: Buffers = "average"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(momentum):
            momentum = _checks.real("momentum", momentum, 0.0, 1.0)
        _checks.choice("buffers", buffers, Buffers)
        super().__init__(unwrap(model), use_buffers=buffers == "average")
        self.momentum = momentum
        self.buffer_mode = buffers
        self.module.requires_grad_(False)
        self._momenta: dict[_BatchNorm, float] = {}
        self.train(False)
        # `n_averaged` as a number of the host, which would wait for the device to read it; None to read it once.
        self._updates: int | None = 0
        cast("Any", self).register_load_state_dict_post_hook(_read_updates_again)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: the average is for prediction only."""
        # `update_bn` calls this before it takes the momenta away, and after it gave them back.
        self._give_momenta_back()
        layers = (m for m in self.module.modules() if isinstance(m, _BatchNorm))
        self._momenta = {m: m.momentum for m in layers if m.momentum is not None}
        return super().train(False)

    def _give_momenta_back(self) -> None:
        """To the BatchNorm layers of an `update_bn` that was interrupted."""
        for m, momentum in self._momenta.items():
            m.momentum = momentum if m.momentum is None else m.momentum

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged model returns."""
        # `update_bn` alone takes the momentum of BatchNorm layers away, and gives it back when it is done.
        refilled = [m for m in self._momenta if m.momentum is None]
        for m in refilled:
            m.train()
        try:
            return self.module(*args, **kwargs)
        except BaseException:
            self._give_momenta_back()
            raise
        finally:
            for m in refilled:
                m.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards ``model``: `m` times the average plus `1 - m` times its weights. Also `update`.

        Args:
            model: the module that the averager was made from, or one like it, wrapped or not; errors as of the class.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._give_momenta_back()
        pairs = self._pairs(unwrap(model))
        updates = int(self.n_averaged) if self._updates is None else self._updates
        momentum = self.momentum
        if callable(momentum) and updates > 0:
            momentum = _checks.real("momentum(updates)", momentum(updates), 0.0, 1.0)
        for ours, theirs, is_averaged in pairs:
            if updates == 0 or not is_averaged:
                ours.copy_(theirs)
        if updates > 0:
            average = get_ema_multi_avg_fn(momentum)
            groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
            for ours, theirs, is_averaged in pairs:
                if is_averaged:
                    groups.setdefault((ours.device, ours.dtype), []).append((ours, theirs.to(ours)))
            for group in groups.values():
                average(*map(list, zip(*group, strict=True)), updates)
        self.n_averaged += 1
        self._updates = updates + 1

    update = update_parameters

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor, bool]]:
        """The averager's and the model's tensors side by side, and whether each pair is averaged (else copied)."""
        pairs = []
        for kind, ours, theirs in (
            ("parameter", dict(self.module.named_parameters()), dict(model.named_parameters())),
            ("buffer", dict(self.module.named_buffers()), dict(model.named_buffers())),
        ):
            for name in [*ours, *(name for name in theirs if name not in ours)]:
                if name not in theirs or name not in ours:
                    owner = "the averager" if name in ours else "the model"
                    raise ValueError(f"{kind} {name!r} exists only in {owner}: update needs the model it was made from")
                if ours[name].shape != theirs[name].shape:
                    raise ValueError(
                        f"{kind} {name!r} must have shape {tuple(ours[name].shape)} as in the averager, "
                        f"got {tuple(theirs[name].shape)}"
                    )
                is_float = ours[name].is_floating_point() or ours[name].is_complex()
                if kind == "buffer" and is_float and self.buffer_mode == "none":
                    continue
                is_averaged = is_float and (kind == "parameter" or self.buffer_mode == "average")
                pairs.append((ours[name].detach(), theirs[name].detach(), is_averaged))
        return pairs

    def extra_repr(self) -> str:
        """The options, for print."""
        return f"momentum={self.momentum!r}, buffers={self.buffer_mode!r}"


def _read_updates_again(averager: MomentumAverager, _: Any) -> None:
    averager._updates = None


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and `torch.compile` wrappers, however nested."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's OptimizedModule has no public name
            model = cast("nn.Module", model._orig_mod)
        else:
            return model

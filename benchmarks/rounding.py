"""`python -m benchmarks.rounding`: what fewer bits in the pair products do to the gradient.

Matrix units round what they multiply: TF32 and float16 to 11 bits, bfloat16 to 8. Here only what is multiplied is
rounded and everything else is float64, so the figures are those of the formulas, on any machine.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from dlprop._kernels import dense

from .problem import Problem

EDGE = 33
BITS = (8, 11, 16, 22)
# A view that differs from the features by so much of their range; the last is another image altogether.
DISTANCES = (0.01, 0.1, 1.0)
SHARPNESS = 30.0  # weight of the similarities in the softmax affinity


def rounded(x: Tensor, bits: int) -> Tensor:
    """``x`` to the nearest number with so many significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).round() * 2.0**-bits, exponent)


def rows(edge: int = EDGE) -> list[tuple[str, int, list[float]]]:
    """What is compared, the order, and the error of the gradient relative to its norm at each number of bits."""
    p = Problem(edge, edge, dtype=torch.float64)
    feats = p.features().flatten(2)
    noise = p.features(5).flatten(2) - 0.5
    targets: list[tuple[str, Tensor]] = [("the loss against labels", p.labels().flatten(1))]
    for distance in DISTANCES:
        targets.append((f"the loss against a view {distance:.0%} apart", (feats + distance * noise).clamp_min(0)))
    found = []
    for title, target in targets:
        for order in (0, 1):
            a, g = (_differences(x, order) if x.is_floating_point() else x for x in (feats, target))
            exact = _gradient(a, g)
            errors = []
            for bits in BITS:
                target_rounded = rounded(g, bits) if g.is_floating_point() else g
                errors.append(float((_gradient(rounded(a, bits), target_rounded) - exact).norm() / exact.norm()))
            found.append((title, order, errors))
    for order in (0, 1):
        unit = _differences(feats, order)
        unit = unit / unit.norm(dim=1, keepdim=True)
        gradients = [_softmax_gradient(p.logits().flatten(2), unit, bits) for bits in (*BITS, 53)]
        exact = gradients.pop()
        found.append(("the softmax affinity", order, [float((x - exact).norm() / exact.norm()) for x in gradients]))
    return found


def _softmax_gradient(logits: Tensor, keys: Tensor, bits: int) -> Tensor:
    """Of `|L P|^2` in the queries, the unit differences times `SHARPNESS`, with the probabilities rounded as well."""
    L, Q, K = (rounded(x, bits) for x in (logits, SHARPNESS * keys, keys))
    P = (Q.mT @ K).softmax(dim=-1)
    grad = 2 * logits @ rounded(P, bits)
    grad_P = L.mT @ rounded(grad, bits)
    grad_S = P * (grad_P - (P * grad_P).sum(dim=-1, keepdim=True))
    return K @ rounded(grad_S, bits).mT


def _differences(x: Tensor, order: int) -> Tensor:
    x = x / x.sum(dim=1, keepdim=True)
    return x.diff(n=order, dim=1)


def _gradient(a: Tensor, g: Tensor) -> Tensor:
    gradient = dense.pairwise_l1(a, g, None, True)[1]
    assert gradient is not None
    return gradient


def table(edge: int = EDGE) -> str:
    """The rows as a table of Markdown."""
    head = f"| gradient of | order | {' | '.join(f'{bits} bits' for bits in BITS)} |"
    lines = [head, "|---" * (len(BITS) + 2) + "|"]
    for title, order, errors in rows(edge):
        lines.append(f"| {title} | {order} | {' | '.join(_percent(error) for error in errors)} |")
    return "\n".join(lines)


def _percent(error: float) -> str:
    return "below 0.1 %" if error < 0.001 else f"{100 * error:.1f} %" if error < 0.1 else f"{100 * error:.0f} %"


if __name__ == "__main__":
    description = (__doc__ or "").split("\n\n")[1]
    argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=description).parse_args()
    print(table())

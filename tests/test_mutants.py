"""Deliberately wrong sources: the comparison with the oracle that the real ones pass must fail each of them.

A mutant is a module of the library whose text has one mistake. It is executed beside the real module, whose functions
and methods then give way to its own. Executed without a mistake it passes, so what fails it is the mistake.
"""

import sys
import types
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path

import pytest
import torch

import dlprop
from dlprop._kernels import residuals
from dlprop.affinity import Pixels, Softmax
from tests import propagation_cases
from tests.kernel_cases import affinity_inputs, normal
from tests.loss_cases import assert_matches, draw_away_from_kinks, draw_mask, evaluate, expect
from tests.oracles import propagation as oracle
from tests.tolerances import assert_close

F64, F32 = torch.float64, torch.float32
TILE_BYTES = 4 * 4 * 8  # four pixels of float64: small images have several tiles, the last of them smaller
BAND_BYTES = 2 * 5 * 5 * 8  # two rows of five pixels and five offsets: small images have several bands

# ---------------------------------------------------------------------------------------------------------------------
# What must notice


def _pairs(form):
    """All the pairs of two orders, in images with ignored pixels and a mask."""
    options = {"reduction": "none", "mask": draw_mask(), "max_order": 1}
    for dtype in (F64, F32):
        feats, target, expected = draw_away_from_kinks(form, dtype=dtype, options=options)
        assert_matches(evaluate(feats, target, **options), expected)


def _fractions():
    """Labels at order 0 where all similarities are in [0, 1]."""
    options = {"reduction": "none", "max_order": 0}
    feats, target, expected = draw_away_from_kinks("labels", options=options, nonnegative=True)
    assert_matches(evaluate(feats, target, **options), expected)


def _every_anchor(form):
    """More anchors than valid pixels: the loss of all pairs."""
    mask = draw_mask()
    mask[:, :2, :2] = False
    options = {"reduction": "none", "mask": mask}
    feats, target, expected = draw_away_from_kinks(form, options=options)
    assert mask.sum((1, 2)).max() < 13
    assert_matches(evaluate(feats, target, num_anchors=13, **options), expected)


def _some_anchors():
    """Fewer anchors than valid pixels, where all pixels are alike: the loss of all pairs, whatever the draw."""
    mask = draw_mask()
    feats, target = (normal(2, 9, 1, 1, seed=seed).expand(2, 9, 3, 5) for seed in (0, 1))
    value, _ = evaluate(feats, target, num_anchors=4, mask=mask, reduction="none")
    assert_close(value, expect(feats, target, mask=mask, reduction="none").value, "loss")


def _propagation(form, target_grid=None, **options):
    """Masked sources on a finer grid than the features, to the features' own pixels or those of another image."""
    logits, feats, target_feats = propagation_cases.inputs(form, (6, 8), (3, 4), target_grid)
    mask = propagation_cases.random_mask(2, 6, 8)
    for resolution in ("feats", "logits"):
        inputs, grids = (logits, feats, target_feats), {"mask": mask, "resolution": resolution}
        actual = propagation_cases.propagate(form, *inputs, **grids, **options)
        assert_close(actual, propagation_cases.expected(form, *inputs, **grids, **options), "propagation")


def _isolated():
    """Degrees below and above a thousandth of their mean."""
    logits, feats, _ = propagation_cases.inputs("degree")
    feats[:, :, 0, 0] *= 1e-4
    feats[:, :, 0, 1] *= 0.1
    options = {"normalize": None, "weights": (1.0,)}
    actual = propagation_cases.propagate("degree", logits, feats, **options)
    assert_close(actual, propagation_cases.expected("degree", logits, feats, **options), "propagation")


def _cancelled():
    """Every vector has its negative: degrees that are roundings."""
    logits, feats = torch.randn(2, 3, 50), torch.randn(2, 7, 25)
    assert torch.equal(propagation_cases.propagate("degree", logits, torch.cat((feats, -feats), 2)), logits)


def _softmax_gradients():
    """The op and all its gradients against autograd on the formula, with similarities far apart."""
    leaves = [x.requires_grad_() for x in (*affinity_inputs(M=15, K=18), normal(2, 18, seed=5))]
    probe = normal(2, 18, 3, seed=9)
    logits, queries, keys, bias = leaves
    out, _ = torch.ops.dlprop.softmax_affinity(logits, 2 * queries, keys, bias, False, None, "tiled")
    expected = (2 * queries @ keys.mT + bias[:, None]).softmax(2).mT @ logits
    assert_close(out, expected.detach(), "propagation")
    gradients = (torch.autograd.grad(x, leaves, probe) for x in (out, expected))
    for actual, wanted in zip(*gradients, strict=True):
        assert_close(actual, wanted, "gradient")


def _attention_gradients():
    """The same over the sources, of which some do not count, and all of one image's do not."""
    bias = normal(2, 18, seed=5)
    bias[0, ::3] = -torch.inf
    inputs = normal(2, 18, 3), normal(2, 15, 5, seed=1), normal(2, 18, 5, seed=2), bias
    probe = normal(2, 15, 3, seed=9)
    for nothing in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        logits, queries, keys, bias = leaves
        if nothing:
            with torch.no_grad():
                bias[1] = -torch.inf
        out, _ = torch.ops.dlprop.softmax_affinity(logits, 2 * queries, keys, bias, True, None, "tiled")
        images = slice(0, 1) if nothing else slice(0, 2)
        expected = (2 * queries @ keys.mT + bias[:, None])[images].softmax(2) @ logits[images]
        assert_close(out[images], expected.detach(), "propagation")
        assert (out[images.stop :] == 0).all(), "propagation"
        gradients = torch.autograd.grad(out, leaves, probe), torch.autograd.grad(expected, leaves, probe[images])
        for actual, wanted in zip(*gradients, strict=True):
            assert_close(actual[images], wanted[images], "gradient")
            assert (actual[images.stop :] == 0).all(), "gradient"


def _window_gradients():
    """And in a window, in several bands, where some sources do not count: some pixels have none."""
    logits, queries, keys = (normal(2, k, 7, 5, seed=seed) for seed, k in enumerate((3, 4, 4)))
    bias = normal(2, 1, 7, 5, seed=5)
    bias[0, :, 4:] = -torch.inf
    leaves = [x.requires_grad_() for x in (logits, queries, keys, bias)]
    probe = normal(2, 3, 7, 5, seed=9)
    offsets = (0, 0), (-1, 0), (0, 2), (1, -1), (3, 1)
    out, _ = torch.ops.dlprop.window_affinity(*leaves, [step for offset in offsets for step in offset])
    y, x = torch.meshgrid(torch.arange(7), torch.arange(5), indexing="ij")
    y, x = (at.flatten()[:, None] - at.flatten() for at in (y, x))
    inside = sum((y == dy) & (x == dx) for dy, dx in offsets) > 0
    S = (keys.flatten(2).mT @ queries.flatten(2) + bias.flatten(1)[:, :, None]).masked_fill(~inside, -torch.inf)
    nothing = S.isneginf().all(1, keepdim=True)
    assert nothing.any()
    shares = S.masked_fill(nothing, 0).softmax(1).masked_fill(nothing, 0)
    expected = (logits.flatten(2) @ shares).view(2, 3, 7, 5)
    assert_close(out, expected.detach(), "propagation")
    gradients = (torch.autograd.grad(x, leaves, probe) for x in (out, expected))
    for actual, wanted in zip(*gradients, strict=True):
        assert_close(actual, wanted, "gradient")


def _window_overflow():
    """Products that are -inf in a whole window are no window without a source."""
    logits, queries = normal(1, 3, 4, 5), torch.full((1, 2, 4, 5), 1e200, dtype=F64)
    for bias in (None, torch.zeros(1, 1, 4, 5, dtype=F64)):
        out, _ = torch.ops.dlprop.window_affinity(logits, queries, -queries, bias, [0, 0, 0, 1])
        assert out.isnan().all(), "propagation"


def _counts():
    """Sources that count a few times, or not at all, and weigh as they count whatever a point weighs."""
    V, W, L = normal(2, 4, 12), normal(2, 4, 12, seed=1), normal(2, 3, 12, seed=2)
    counts = (torch.arange(1, 25) % 4).double().view(2, 1, 12)
    counts[1, :, 3:] = 0
    for options in ({}, {"radius": 1}):
        inside = torch.from_numpy(oracle.window((3, 4), 1)) if options else None
        for similarity in ("dot", "gaussian"):
            affinity = Softmax(over="sources", similarity=similarity, **options)
            sources = Pixels(V, L, counts, grid=(3, 4), points_per_source=0.3)
            out = affinity.propagate(sources, Pixels(W, torch.zeros(2, 3, 1, dtype=F64), grid=(3, 4)))
            wanted = propagation_cases.dense(L, V, W, counts[:, 0], inside, over="sources", similarity=similarity)
            assert_close(out, wanted, "propagation")


def _far_from_the_origin():
    """float32 features whose spread is a thousandth of their mean: of the Gaussian, and as a matrix."""
    shift = 1000 * torch.randn(1, 5, 1, 1)
    logits, feats, targets = propagation_cases.inputs("attention", (4, 5), None, (4, 5), dtype=F32)
    tensors = logits, feats + shift, targets + shift
    for form, options in (("softmax", {}), ("attention", {}), ("attention", {"radius": 1})):
        options = {"similarity": "gaussian", "normalize": None, **options}
        actual = propagation_cases.propagate(form, *tensors, **options)
        wanted = propagation_cases.expected(form, *tensors, **options)
        error = abs(actual.double().numpy() - wanted).max()
        assert error < 1e-3, f"propagation: error {error}"


def _matrix():
    """`derivative_similarity` of features about the origin and far from it."""
    for dtype, shift, bound in ((F64, 0.0, 1e-12), (F32, 1000.0, 1e-3)):
        V, W = ((normal(1, 5, m, seed=m) + shift * normal(1, 5, 1, seed=9)).to(dtype) for m in (6, 4))
        actual = dlprop.derivative_similarity(V, W, similarity="gaussian", normalize=None)
        S = oracle.affinity_matrix(V[0].double().numpy(), W[0].double().numpy(), (0.0, 1.0), similarity="gaussian")
        error = abs(actual[0].double() - torch.from_numpy(S).exp()).max()
        assert error < bound, f"propagation: error {error}"


def _bfloat16():
    """Residuals of positive views in 8 and in 16 bits, of themselves."""
    (a, g), (c, h) = ((v, v + 0.01 * normal(2, m, 6, seed=m)) for m in (9, 7) for v in [normal(2, m, 6).abs() + 3])
    wanted = a @ c.mT - g @ h.mT
    views = [tuple(x.float() for x in view) for view in ((a, g), (c, h))]
    for pieces, bits in ((1, 8), (2, 16)):
        left, right = residuals.bfloat16_factors(*views, pieces)
        error = (left.double() @ right.double().mT - wanted).norm() / wanted.norm()
        assert error < 2.0**-bits, f"loss: error {error}"


CASES = {
    "labels": lambda: _pairs("labels"),
    "features": lambda: _pairs("features"),
    "fractions": _fractions,
    "anchors, labels": lambda: _every_anchor("labels"),
    "anchors, features": lambda: _every_anchor("features"),
    "some anchors": _some_anchors,
    "sum": lambda: _propagation("sum"),
    "mean": lambda: _propagation("mean"),
    "degree": lambda: _propagation("degree"),
    "isolated": _isolated,
    "cancelled": _cancelled,
    "cosine": lambda: _propagation("sum", similarity="cosine", weights=(2.0, 0.5), target_grid=(2, 5)),
    "softmax": lambda: _propagation("softmax", weights=(3.0, 1.0), chunk_size=4),
    "softmax of another image": lambda: _propagation("softmax", target_grid=(2, 5), normalize="l2"),
    "softmax, cosine": lambda: _propagation("softmax", similarity="cosine", weights=(4.0, 1.0)),
    "softmax gradients": _softmax_gradients,
    "softmax, gaussian": lambda: _propagation("softmax", similarity="gaussian", target_grid=(3, 4), weights=(9.0, 4.0)),
    "attention": lambda: _propagation("attention", weights=(9.0, 4.0), chunk_size=4),
    "attention, cosine": lambda: _propagation("attention", similarity="cosine", target_grid=(2, 5), normalize="l2"),
    "attention, gaussian": lambda: _propagation("attention", similarity="gaussian", weights=(9.0, 4.0)),
    "attention gradients": _attention_gradients,
    "window": lambda: _propagation("attention", target_grid=(3, 4), radius=1, dilation=(1, 2), weights=(9.0, 4.0)),
    "window, gaussian": lambda: _propagation(
        "attention", target_grid=(3, 4), similarity="gaussian", radius=2, weights=(9.0, 4.0)
    ),
    "window gradients": _window_gradients,
    "window overflow": _window_overflow,
    "counts": _counts,
    "far from the origin": _far_from_the_origin,
    "matrix": _matrix,
    "bfloat16": _bfloat16,
}
PAIRS = ["labels", "features"]
ANCHORS = ["anchors, labels", "anchors, features"]

# ---------------------------------------------------------------------------------------------------------------------
# What is wrong: for each module the right text, which occurs once, the wrong one, and the cases that notice

TILED = {
    "off the diagonal once": ("(1 if i == j else 2)", "1", PAIRS),
    "on the diagonal twice": ("(1 if i == j else 2)", "2", PAIRS),
    "both halves, and twice": ("in blocks[p:]", "in blocks", PAIRS),
    "residual for its sign": ("R.sign_()\n                    _add_product(grad[", "_add_product(grad[", PAIRS),
    "sign of the gradient": (
        "_add_product(grad[n, i], R, features[n, j], alpha=2)",
        "_add_product(grad[n, i], R, features[n, j], alpha=-2)",
        PAIRS,
    ),
    "gradient of one role": ("R, features[n, j], alpha=2)", "R, features[n, j])", PAIRS),
    "gradient overwritten": ("(grad[n, i], R,", "(grad[n, i].zero_(), R,", PAIRS),
    "gradient of one block of rows": ("if i != j:", "if False:", PAIRS),
    "the diagonal's gradient in both blocks": ("if i != j:", "if True:", PAIRS),
    "transposed block": (
        "(grad[n, j], R.T, features[n, i], alpha=2)",
        "(grad[n, j], R.T.flip(1), features[n, i], alpha=2)",
        PAIRS,
    ),
    "another image's gradient": ("(grad[n, j], R.T", "(grad[0, j], R.T", PAIRS),
    "ragged last tile dropped": (
        "range(0, M, tile)]",
        "range(0, M - tile + 1, tile)]",
        [*PAIRS, *ANCHORS, "softmax gradients"],
    ),
    "tiles overlap": ("slice(i, min(i + tile, M))", "slice(i, min(i + tile + 1, M))", [*PAIRS, *ANCHORS]),
    "transposed block of the anchors": (
        "(grad_columns[n, k], R.T,",
        "(grad_columns[n, k], R.T.flip(1),",
        ANCHORS,
    ),
    "anchors without gradient": (
        "(grad_columns[n, k], R.T, features[n, i])",
        "(grad_columns[n, k], R.T, features[n, i], alpha=0)",
        ANCHORS,
    ),
    "residual of the anchors for its sign": (
        "R.sign_()\n                    _add_product(grad_rows",
        "_add_product(grad_rows",
        ANCHORS,
    ),
    "log-sum-exp factor": ("exp_(earlier - top) for", "torch.ones_like(top) for", ["softmax gradients"]),
    "sums not rescaled": ("x * factor for x", "x for x", ["softmax gradients"]),
    "log-sum-exp without its largest": (
        "(top + total.log())[:, 0]\n        carried",
        "total.log()[:, 0]\n        carried",
        ["softmax gradients"],
    ),
    "attention's log-sum-exp without its largest": (
        "(top + total.log())[:, 0]\n    return",
        "total.log()[:, 0]\n    return",
        ["attention gradients"],
    ),
    "rows that do not sum to 1": (
        "carried = logits[n, i] / total",
        "carried = logits[n, i]",
        ["softmax", "softmax gradients"],
    ),
    "a chunk missing": (
        "for i in _blocks(M, chunk, keys):\n            size",
        "for i in _blocks(M, chunk, keys)[1:]:\n            size",
        ["softmax", "softmax gradients"],
    ),
    "a block of targets missing": (
        "for i in _blocks(M, chunk, keys):\n            yield n, i, [(j, tile(",
        "for i in _blocks(M, chunk, keys)[1:]:\n            yield n, i, [(j, tile(",
        ["attention", "attention gradients"],
    ),
    "bias forgotten": ("out += bias[n, j]", "pass", ["softmax gradients", "attention gradients", "counts"]),
    "largest entry of one tile": (
        "torch.maximum(top, P.amax(dim=1, keepdim=True))\n            exp_(P.sub_(highest)",
        "P.amax(dim=1, keepdim=True)\n            exp_(P.sub_(highest)",
        ["attention gradients"],
    ),
    "sum of earlier tiles not rescaled": ("total * factor + P.sum", "total + P.sum", ["attention gradients"]),
    "what a target has not rescaled": (".mul_(factor.T).addmm_(", ".addmm_(", ["attention gradients"]),
    "shares that do not sum to 1": ("out[n, :, i] /= total.T", "pass", ["attention", "attention gradients"]),
    "no source divided by": (
        "total = torch.where(total == 0, nothing[n], total)",
        "pass",
        ["attention gradients"],
    ),
    "largest entry of nothing": (
        "torch.finfo(queries.dtype).min)",
        "-torch.inf)",
        ["attention gradients"],
    ),
    "gradient of the last tile's sources": (
        "grad_logits[n, j].addmm_(P.T",
        "grad_logits[n, j].zero_().addmm_(P.T",
        ["attention gradients"],
    ),
    "attention's row sums": (".sub_(row_sums[n, i]))", ")", ["attention gradients"]),
    "attention's row sums of the logits": (
        "row_sums = (grad * out)",
        "row_sums = (grad * grad)",
        ["attention gradients"],
    ),
    "another image's row sums": ("row_sums[n, i]", "row_sums[0, i]", ["attention gradients"]),
    "softmax row sum": (".sub_(row_sum))", ")", ["softmax gradients"]),
    "row sum of another size": ("row_sum = (logits[n, i] *", "row_sum = (2 * logits[n, i] *", ["softmax gradients"]),
    "gradient of the last chunk's keys": (
        ".sub_(row_sum))",
        ".sub_(row_sum))\n            gradients.keys[n, j] = 0",
        ["softmax gradients"],
    ),
    "gradient of the last tile's queries": (
        ".sub_(row_sum))",
        ".sub_(row_sum))\n            gradients.queries[n, i] = 0",
        ["softmax gradients"],
    ),
    "gradient of the last chunk's bias": (
        ".sub_(row_sum))",
        ".sub_(row_sum))\n            gradients.bias[n, j] = 0",
        ["softmax gradients"],
    ),
    "gradient of the last targets' sources": (
        ".sub_(row_sums[n, i]))",
        ".sub_(row_sums[n, i]))\n                gradients.keys[n, j] = 0",
        ["attention gradients"],
    ),
    "gradient of the last sources' targets": (
        ".sub_(row_sums[n, i]))",
        ".sub_(row_sums[n, i]))\n                gradients.queries[n, i] = 0",
        ["attention gradients"],
    ),
    "gradient of the last targets' bias": (
        ".sub_(row_sums[n, i]))",
        ".sub_(row_sums[n, i]))\n                gradients.bias[n, j] = 0",
        ["attention gradients"],
    ),
    "gradient of the last tile's logits": (
        "grad_logits[n, i].addmm_(",
        "grad_logits[n, i].zero_().addmm_(",
        ["softmax gradients"],
    ),
}
RESIDUALS = {
    "target added": ("alpha=-1)", "alpha=1)", ["features", "anchors, features"]),
    "labels added": ("R -= (g[:, None]", "R += (g[:, None]", ["labels", "anchors, labels"]),
    "another image's target": (
        "self.target[n, i], self.column_target[n, k]",
        "self.target[n, i], self.column_target[0, k]",
        [*PAIRS, *ANCHORS],
    ),
    "ignored label equal to itself": ("target < 0, -2,", "target < 0, -1,", ["labels", "anchors, labels"]),
    "features for differences": ("e, s = features - target,", "e, s = features,", ["bfloat16"]),
    "sum for the mean of the views": ("(features + target) / 2 - m", "(features + target) - m", ["bfloat16"]),
    "common part forgotten": (
        "torch.cat((e, leading, of_m - leading)",
        "torch.cat((e, leading, leading)",
        ["bfloat16"],
    ),
    "common part left in": ("(features + target) / 2 - m", "(features + target) / 2", ["bfloat16"]),
    "left factor twice": ("right[:, :, width:]", "right[:, :, : 2 * width]", ["bfloat16"]),
    "rest of the differences forgotten": ("e_piece, e_rest.bfloat16())", "e_piece, 0 * e_piece)", ["bfloat16"]),
    "pieces in another order": (
        "(s_piece, s_rest.bfloat16(), s_piece)",
        "(s_piece, s_piece, s_rest.bfloat16())",
        ["bfloat16"],
    ),
}
LOSS = {
    "pixels for pairs": ("count.square().clamp_min(1)", "count.clamp_min(1)", PAIRS),
    "all pixels counted": ("valid.sum(dim=1).to(V.dtype)", "(valid.sum(dim=1) * 0 + M).to(V.dtype)", PAIRS),
    "sparsity of another order": (
        "difference(x, self.max_order + 1, channels",
        "difference(x, self.max_order, channels",
        PAIRS,
    ),
    "sparsity with a sign": ("channels, self.scheme).abs().sum(", "channels, self.scheme).sum(", PAIRS),
    "sparsity of some pixels": ("parts = [V] if in_one", "parts = [V[..., :2]] if not in_one", PAIRS),
    "order 0 missing": ("range(self.max_order, -1, -1)", "range(self.max_order, 0, -1)", PAIRS),
    "differences in reverse order": (
        "a, g = difference(V, q, 2,",
        "a, g = difference(V, self.max_order - q, 2,",
        ["features"],
    ),
    "features of ignored pixels": ("a, g = _only(valid, a, 2), _only(valid, g, 2)", "", PAIRS),
    "ignored labels counted": ("(labels != self.ignore_index) & (labels >= 0)", "labels >= 0", ["labels"]),
    "mask forgotten": ("valid = valid & mask.flatten(1)", "pass", ["labels"]),
    "classes of sorted pixels": (
        "scatter(1, pixels, numbers)",
        "scatter(1, pixels.sort(dim=1)[0], numbers)",
        ["labels"],
    ),
    "signed features for fractions": ("bool(V.detach().amin() >= 0)", "True", ["labels"]),
    "one of the two mixed terms": ("- 2 * own", "- own", ["fractions"]),
    "anchors' scale, all anchors": ("count / count.clamp(1, K)", "count / K", ANCHORS),
    "anchors' scale, all pixels": (
        "count / count.clamp(1, K)",
        "V.shape[1] / count.clamp(1, K)",
        [*ANCHORS, "some anchors"],
    ),
    "anchors' scale forgotten": ("count / count.clamp(1, K)", "1.0", ["some anchors"]),
    "anchors drawn from ignored pixels": ("lots.masked_fill(~valid, -1)", "lots", [*ANCHORS, "some anchors"]),
    "targets of other pixels": ("_at(anchors, g))", "_at(anchors.flip(1), g))", ANCHORS),
}
WINDOW = {
    "bias forgotten": ("part += compared.bias[n][source][0]", "pass", ["window", "window gradients", "counts"]),
    "bias of the target": (
        "part += compared.bias[n][source][0]",
        "part += compared.bias[n][at][0]",
        ["window gradients", "counts"],
    ),
    "what lies beyond the border counts": (
        "queries.shape[2]), -torch.inf)",
        "queries.shape[2]), 0.0)",
        ["window gradients", "window"],
    ),
    "offsets the other way": (
        "in zip(offsets[::2], offsets[1::2], strict=True):",
        "in ((-a, -b) for a, b in zip(offsets[::2], offsets[1::2], strict=True)):",
        ["window gradients"],
    ),
    "columns for rows": (
        "zip(offsets[::2], offsets[1::2], strict=True)",
        "zip(offsets[1::2], offsets[::2], strict=True)",
        ["window gradients"],
    ),
    "a band that forgets the one above": (
        "first, last = max(top, -dy), ",
        "first, last = max(top, top - dy), ",
        ["window gradients"],
    ),
    "last rows dropped": ("range(0, H, height)", "range(0, H - height + 1, height)", ["window gradients"]),
    "shares that do not sum to 1": ("P /= total", "pass", ["window", "window gradients"]),
    "no source divided by": (" == -torch.inf), 1)", " == -torch.inf), torch.nan)", ["window gradients"]),
    "overflow taken for no source": ("total.masked_fill(is_empty, torch.nan)", "total + is_empty", ["window overflow"]),
    "largest entry of nothing": ("torch.where(top == -torch.inf, 0, top)", "top", ["window gradients"]),
    "a channel forgotten": ("zip(a[1:], b[1:], strict=True)", "zip(a[2:], b[2:], strict=True)", ["window gradients"]),
    "logits of the target": (
        "addcmul_(logits[n][source], share",
        "addcmul_(logits[n][at], share",
        ["window gradients"],
    ),
    "another image's logits": (
        "addcmul_(logits[n][source], share",
        "addcmul_(logits[0][source], share",
        ["window gradients"],
    ),
    "gradient of the logits at the target": (
        "grad_logits[n][source].addcmul_(grad[n][at]",
        "grad_logits[n][at].addcmul_(grad[n][at]",
        ["window gradients"],
    ),
    "gradient of the keys at the target": (
        "gradients.keys[n][source].addcmul_",
        "gradients.keys[n][at].addcmul_",
        ["window gradients"],
    ),
    "gradient of the bias of the first image": (
        "gradients.bias[n][source] +=",
        "gradients.bias[0][source] +=",
        ["window gradients"],
    ),
    "row sums forgotten": (" - (grad[n, :, rows] * out[n, :, rows]).sum(dim=0)", "", ["window gradients"]),
    "row sums of other rows": ("* out[n, :, rows]).sum", "* out[n, :, rows].flip(1)).sum", ["window gradients"]),
}
LINEAR = {
    "counts not multiplied": ("L = sources.weighted(sources.logits)", "L = sources.logits", ["sum", "mean", "degree"]),
    "counts missing in the degree": (
        "ones = sources.weighted(torch.ones_like(L[:, :1]))",
        "ones = torch.ones_like(L[:, :1])",
        ["degree"],
    ),
    "mean's count": (
        "total = sources.weighted(torch.ones_like(sources.counts)).sum(dim=2, keepdim=True)",
        "total = torch.full_like(L[:, :1, :1], L.shape[2])",
        ["mean"],
    ),
    "degree threshold of nothing": ("SMALLEST_DEGREE = 1e-3", "SMALLEST_DEGREE = 0.0", ["isolated"]),
    "degree threshold of a fifth": ("SMALLEST_DEGREE = 1e-3", "SMALLEST_DEGREE = 0.2", ["isolated"]),
    "degree threshold without rounding": ("DEGREE_ROUNDINGS = 8", "DEGREE_ROUNDINGS = 0", ["cancelled"]),
    "nothing for the isolated": ("torch.where(is_isolated, own,", "torch.where(is_isolated, 0 * own,", ["isolated"]),
    "sources not normalised": ("low_rank(L * norm,", "low_rank(L,", ["sum", "mean"]),
    "targets not normalised": ("self.scheme) * target_norm)", "self.scheme))", ["sum", "mean"]),
    "weights in reverse order": ("zip(self.weights, rows,", "zip(self.weights[::-1], rows,", ["cosine"]),
    "sources for targets": (
        "rows if W is V else self.unit_differences(W)",
        "self.unit_differences(W.flip(2))",
        ["cosine"],
    ),
}
SOFTMAX = {
    "counts not multiplied": ("L = sources.weighted(sources.logits)", "L = sources.logits", ["softmax"]),
    "weights in reverse order": (
        "zip(self.weights, units,",
        "zip(self.weights[::-1], units,",
        ["softmax, cosine"],
    ),
    "no metric": ("return metric(V, self.weights, 1, self.scheme)", "return V", ["softmax", "attention", "window"]),
    "metric in reverse order": (
        "return metric(V, self.weights, 1,",
        "return metric(V, self.weights[::-1], 1,",
        ["softmax", "attention", "window"],
    ),
    "orders of the targets reversed": (
        "return rows, torch.cat(others",
        "return rows, torch.cat(others[::-1]",
        ["softmax, cosine", "attention, cosine"],
    ),
    "norms of the sources": ('x = V if self.over == "sources" else W', "x = V", ["softmax, gaussian"]),
    "norms of the targets": ('x = V if self.over == "sources" else W', "x = W", ["window, gaussian"]),
    "norms without the metric": (
        "(x * metric(x, self.weights, 1, self.scheme))",
        "(x * x)",
        ["softmax, gaussian", "attention, gaussian", "window, gaussian"],
    ),
    "norms with the wrong sign": (".sum(dim=1) / -2", ".sum(dim=1) / 2", ["softmax, gaussian", "attention, gaussian"]),
    "norms whole": (".sum(dim=1) / -2", ".sum(dim=1) / -1", ["softmax, gaussian", "attention, gaussian"]),
    "squares about zero": ("is_same, V = W is V, V - origin", "is_same, origin = W is V, 0", ["far from the origin"]),
    "origin of one side": ("W = V if is_same else W - origin", "pass", ["attention, gaussian"]),
    "counts as they are": ("counts[:, 0].log()", "counts[:, 0]", ["attention", "counts"]),
    "counts forgotten with the gaussian": (
        "log if bias is None else log + bias",
        "bias if bias is not None else log",
        ["counts"],
    ),
    "gaussian forgotten with counts": ("log if bias is None else log + bias", "log", ["counts", "attention, gaussian"]),
    "padding counts": ("counts.masked_fill(is_padding, 0)", "counts", ["counts"]),
    "logits of other sources": (
        "for x in (V, L, counts))\n    counts =",
        "for x in (V, L.flip(2), counts))\n    counts =",
        ["attention", "counts"],
    ),
    "counts of a window forgotten": ("bias = _times(sources.counts, bias)", "pass", ["window", "counts"]),
    "one dilation of several": ("for d in dilations for a", "for d in dilations[:1] for a", ["window"]),
    "offsets counted for every dilation": (
        "return sorted({(d * a, d * b) for d in dilations for a, b in product(steps, steps)})",
        "return sorted([(d * a, d * b) for d in dilations for a, b in product(steps, steps)])",
        ["window"],
    ),
    "radius without its end": ("range(-radius, radius + 1)", "range(-radius, radius)", ["window", "window, gaussian"]),
}
ORDERS = {
    "differences in reverse order": (
        "difference(V, q, 1,",
        "difference(V, len(self.weights) - 1 - q, 1,",
        ["cosine", "softmax, cosine"],
    ),
    "differences without unit length": (
        'normalize_features(difference(V, q, 1, self.scheme), "l2")',
        "difference(V, q, 1, self.scheme)",
        ["cosine", "attention, cosine"],
    ),
    "targets not normalised": (
        "else normalize_features(targets.feats, self.normalize)",
        "else targets.feats",
        ["softmax of another image"],
    ),
}
SIMILARITY = {
    "distance not halved": ("(lengths + others.mT) / 2)", "(lengths + others.mT))", ["matrix"]),
    "norms of the rows twice": ("(lengths + others.mT) / 2", "lengths", ["matrix"]),
    "distance in float32": ('statistics_dtype(feats) if similarity == "gaussian" else ', "", ["matrix"]),
    "no exponential": ("torch.exp(rows", "(rows", ["matrix"]),
}
FEATURES = {
    "adjoint of the logits replaced by a resize": (
        "upsampling.adjoint(L) / torch.where(counts == 0, 1, counts)",
        "upsampling.resample(L)",
        ["sum", "softmax"],
    ),
    "adjoint of the counts replaced by a resize": (
        "counts = upsampling.adjoint(counts)",
        "counts = upsampling.resample(counts)",
        ["sum", "softmax"],
    ),
    "adjoint at full resolution replaced by a resize": (
        "self.upsampling.adjoint(x)",
        "self.upsampling.resample(x)",
        ["sum", "mean"],
    ),
    "no mean over the sources of a point": (" / torch.where(counts == 0, 1, counts)", "", ["sum", "softmax"]),
    "masked sources give": ("torch.where(is_source, logits, 0)", "logits", ["sum", "softmax"]),
    "counts not multiplied": ("x * (self.counts * self.points_per_source)", "x", ["sum", "softmax"]),
    "sources weigh more than points": ("self.counts * self.points_per_source", "self.counts", ["sum", "softmax"]),
    "another norm": ('1 if normalize == "l1" else 2', "1", ["softmax of another image"]),
}
MUTANTS = {
    "_kernels.tiled": TILED,
    "_kernels.residuals": RESIDUALS,
    "_kernels.window": WINDOW,
    "loss": LOSS,
    "affinity.linear": LINEAR,
    "affinity.softmax": SOFTMAX,
    "affinity._orders": ORDERS,
    "similarity": SIMILARITY,
    "features": FEATURES,
}

# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def replace(monkeypatch):
    """Execute the text of a module, with one text in place of another, and let its code run instead of the real."""

    def run(name, right="", wrong=""):
        module = import_module(f"dlprop.{name}")
        source = Path(module.__file__).read_text()
        if right:
            assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times in {name}"
        mutant = types.ModuleType(module.__name__)
        mutant.__spec__, mutant.__package__, mutant.__file__ = module.__spec__, module.__package__, module.__file__
        exec(compile(source.replace(right, wrong) if right else source, module.__file__, "exec"), vars(mutant))
        if name == "_kernels.tiled":
            mutant.CPU_TILE_BYTES = TILE_BYTES
        if name == "_kernels.window":
            mutant.CPU_BAND_BYTES = BAND_BYTES
        for key, new in list(vars(mutant).items()):
            if getattr(new, "__module__", None) != module.__name__:
                continue
            old = getattr(module, key)
            if isfunction(new):
                _put(new, old, monkeypatch)
            elif isclass(new):
                # A method that calls super() belongs to the mutant's class; a dataclass's own are all alike.
                for method, code in vars(new).items():
                    if isfunction(code) and code.__closure__ is None and not method.startswith("__"):
                        monkeypatch.setattr(old, method, code)

    return run


def _put(new, old, monkeypatch):
    """Put a function in the place of another wherever the library has it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "dlprop":
            for key in [key for key, value in vars(module).items() if value is old]:
                monkeypatch.setattr(module, key, new)


@pytest.mark.parametrize("case", CASES)
def test_the_source_without_a_mistake_passes(replace, case):
    CASES[case]()
    for module in MUTANTS:
        replace(module)
    torch.manual_seed(0)
    CASES[case]()


@pytest.mark.parametrize(
    ("module", "mistake"), [(module, mistake) for module, mutants in MUTANTS.items() for mistake in mutants]
)
def test_a_mistake_fails(replace, module, mistake):
    right, wrong, cases = MUTANTS[module][mistake]
    replace(module, right, wrong)
    for case in cases:
        torch.manual_seed(0)
        with pytest.raises(AssertionError, match=r"loss|gradient|propagation"):
            CASES[case]()

"""Every mistake a user of the loss can make: the error names the argument, what was expected and what came."""

import numpy as np
import pytest
import torch
from torch import nn

from dlprop import DerivativeLoss

FEATS = torch.arange(2 * 6 * 3 * 4, dtype=torch.float32).reshape(2, 6, 3, 4).sin()
LABELS = torch.arange(24).reshape(2, 3, 4) % 3
FLAT = FEATS.flatten(2)
FLAT_LABELS = LABELS.flatten(1)

OPTION_ERRORS = [
    ({"max_order": -1}, ValueError, "max_order .*at least 0.*-1"),
    ({"max_order": 1.0}, TypeError, "max_order .*int.*1.0"),
    ({"max_order": True}, TypeError, "max_order .*int.*True"),
    ({"max_order": "1"}, TypeError, "max_order .*int.*'1'"),
    ({"max_order": None}, TypeError, "max_order .*int.*None"),
    ({"eta": -0.25}, ValueError, "eta .*0.*-0.25"),
    ({"eta": float("nan")}, ValueError, "eta .*nan"),
    ({"eta": float("inf")}, ValueError, "eta .*inf"),
    ({"eta": "half"}, TypeError, "eta .*half"),
    ({"eta": True}, TypeError, "eta .*True"),
    ({"eta": torch.tensor(0.5)}, TypeError, "eta .*Tensor"),
    ({"eta": nn.Parameter(torch.tensor(0.5))}, TypeError, "eta .*Parameter"),
    ({"norm": "l2"}, ValueError, "norm .*l1.*frobenius.*'l2'"),
    ({"norm": nn.L1Loss()}, TypeError, "norm .*L1Loss"),
    ({"norm": 1}, TypeError, "norm .*l1.*frobenius.*1"),
    ({"norm": None}, (ValueError, TypeError), "norm .*l1.*frobenius.*None"),
    ({"scheme": "backward"}, ValueError, "scheme .*forward.*central.*sum.*laplacian.*'backward'"),
    ({"scheme": None}, (ValueError, TypeError), "scheme .*forward.*None"),
    ({"normalize": "max"}, ValueError, "normalize .*l1.*l2.*softmax.*'max'"),
    ({"normalize": True}, TypeError, "normalize .*l1.*True"),
    ({"reduction": "average"}, ValueError, "reduction .*none.*mean.*sum.*'average'"),
    ({"reduction": None}, (ValueError, TypeError), "reduction .*none.*mean.*sum.*None"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index .*int.*1.5"),
    ({"ignore_index": True}, TypeError, "ignore_index .*int.*True"),
    ({"ignore_index": None}, TypeError, "ignore_index .*int.*None"),
    ({"align_corners": 1}, TypeError, "align_corners .*bool.*1"),
    ({"align_corners": None}, TypeError, "align_corners .*bool.*None"),
    ({"num_anchors": 0}, ValueError, "num_anchors .*at least 1.*0"),
    ({"num_anchors": -3}, ValueError, "num_anchors .*at least 1.*-3"),
    ({"num_anchors": 2.0}, TypeError, "num_anchors .*int.*2.0"),
    ({"num_anchors": True}, TypeError, "num_anchors .*int.*True"),
    ({"num_anchors": 4, "norm": "frobenius"}, ValueError, "(?=.*num_anchors)(?=.*frobenius).*got.*4"),
    ({"backend": "triton", "norm": "frobenius"}, ValueError, "(?=.*backend)(?=.*frobenius).*got.*'triton'"),
    ({"chunk_size": 0}, ValueError, "chunk_size .*at least 1.*0"),
    ({"chunk_size": 64.0}, TypeError, "chunk_size .*int.*64.0"),
    ({"chunk_size": False}, TypeError, "chunk_size .*int.*False"),
    ({"backend": "cuda"}, ValueError, "backend .*auto.*tiled.*triton.*'cuda'"),
    ({"backend": "dense"}, ValueError, "backend .*'dense'"),
    ({"backend": None}, (ValueError, TypeError), "backend .*auto.*None"),
]


OPTION_IDS = [",".join(f"{name}={value!r}" for name, value in options.items()) for options, _, _ in OPTION_ERRORS]


@pytest.mark.parametrize(("options", "error", "message"), OPTION_ERRORS, ids=OPTION_IDS)
def test_options_are_checked_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        DerivativeLoss(**options)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        DerivativeLoss(1)
    with pytest.raises(TypeError, match="positional"):
        DerivativeLoss()(FEATS, LABELS, None)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="sigma"):
        DerivativeLoss(sigma=1)


CALL_ERRORS = {
    "feats no tensor": ((FEATS.numpy(), LABELS), {}, TypeError, "feats .*[Tt]ensor.*ndarray"),
    "feats None": ((None, LABELS), {}, TypeError, "feats .*[Tt]ensor.*NoneType"),
    "feats integer": ((FEATS.long(), LABELS), {}, TypeError, "feats .*floating.*int64"),
    "feats complex": ((FEATS.to(torch.complex64), LABELS), {}, TypeError, "feats .*floating.*complex64"),
    "feats rank 2": ((FEATS[0, 0], LABELS), {}, ValueError, r"feats .*shape.*\(3, 4\)"),
    "feats rank 5": ((FEATS[None], LABELS), {}, ValueError, r"feats .*shape.*\(1, 2, 6, 3, 4\)"),
    "no pixels": ((FEATS[..., :0], LABELS), {}, ValueError, r"feats .*\(2, 6, 3, 0\)"),
    "no channels": ((FEATS[:, :0], LABELS), {}, ValueError, r"feats .*\(2, 0, 3, 4\)"),
    "target no tensor": ((FEATS, LABELS.tolist()), {}, TypeError, "target .*[Tt]ensor.*list"),
    "target array": ((FEATS, np.zeros((2, 3, 4), dtype=np.int64)), {}, TypeError, "target .*[Tt]ensor.*ndarray"),
    "target bool": ((FEATS, LABELS > 0), {}, TypeError, "target .*bool"),
    "target complex": ((FEATS, FEATS.to(torch.complex64)), {}, TypeError, "target .*complex64"),
    "labels of one image": ((FEATS, LABELS[0]), {}, ValueError, r"target .*\(N, H, W\).*\(3, 4\)"),
    "labels with a channel axis": ((FEATS, LABELS[:, None]), {}, ValueError, r"target .*\(N, H, W\).*\(2, 1, 3, 4\)"),
    "labels of another batch": ((FEATS, LABELS[:1]), {}, ValueError, "(?s)(?=.*feats)(?=.*target).*batch.*2.*1|1.*2"),
    "labels without pixels": ((FEATS, LABELS[..., :0]), {}, ValueError, r"target .*\(2, 3, 0\)"),
    "flat labels for maps": ((FEATS, FLAT_LABELS), {}, ValueError, r"target .*\(N, H, W\).*\(2, 12\)"),
    "label maps for flat": ((FLAT, LABELS), {}, ValueError, r"target .*\(N, M\).*\(2, 3, 4\)"),
    "flat labels of other M": ((FLAT, FLAT_LABELS[:, 1:]), {}, ValueError, r"(?=.*target).*12.*11"),
    "flat labels of other N": ((FLAT, FLAT_LABELS[:1]), {}, ValueError, "(?=.*target).*2.*1"),
    "features of another grid": ((FEATS, FEATS[..., 1:]), {}, ValueError, r"(?=.*target).*4\).*3\)"),
    "features of another width": ((FEATS, FEATS[:, 1:]), {}, ValueError, "(?=.*target).*6.*5"),
    "features of another batch": ((FEATS, FEATS[:1]), {}, ValueError, "(?=.*target).*2.*1"),
    "flat features for maps": ((FEATS, FLAT), {}, ValueError, r"(?=.*target).*\(2, 6, 3, 4\).*\(2, 6, 12\)"),
    "features of another dtype": ((FEATS, FEATS.double()), {}, TypeError, "(?=.*target).*float32.*float64"),
    "labels elsewhere": ((FEATS, LABELS.to("meta")), {}, ValueError, "(?=.*target)(?=.*device).*cpu.*meta"),
    "features elsewhere": ((FEATS, FEATS.to("meta")), {}, ValueError, "(?=.*target)(?=.*device).*cpu.*meta"),
    "mask no tensor": ((FEATS, LABELS), {"mask": [True]}, TypeError, "mask .*tensor.*list"),
    "mask no bool": ((FEATS, LABELS), {"mask": LABELS}, TypeError, "mask .*bool.*int64"),
    "mask of another grid": (
        (FEATS, LABELS),
        {"mask": LABELS[..., 1:] > 0},
        ValueError,
        r"mask .*\(2, 3, 4\).*\(2, 3, 3\)",
    ),
    "mask of another batch": (
        (FEATS, LABELS),
        {"mask": LABELS[:1] > 0},
        ValueError,
        r"mask .*\(2, 3, 4\).*\(1, 3, 4\)",
    ),
    "mask without a batch": (
        (FEATS, FEATS),
        {"mask": LABELS[0] > 0},
        ValueError,
        r"mask .*\(2, 3, 4\).*\(3, 4\)",
    ),
    "mask on the features' grid": (
        (FEATS, LABELS.repeat(1, 2, 2)),
        {"mask": LABELS > 0},
        ValueError,
        r"mask .*\(2, 6, 8\).*\(2, 3, 4\)",
    ),
    "mask of channels": (
        (FEATS, FEATS),
        {"mask": FEATS > 0},
        ValueError,
        r"mask .*\(2, 3, 4\).*\(2, 6, 3, 4\)",
    ),
    "flat mask for maps": ((FEATS, FEATS), {"mask": FLAT_LABELS > 0}, ValueError, r"mask .*\(2, 3, 4\).*\(2, 12\)"),
    "mask elsewhere": (
        (FEATS, LABELS),
        {"mask": (LABELS > 0).to("meta")},
        ValueError,
        "mask(?=.*device).*meta.*cpu",
    ),
}


@pytest.mark.parametrize("case", CALL_ERRORS)
def test_tensors_are_checked_at_the_call(case):
    arguments, options, error, message = CALL_ERRORS[case]
    with pytest.raises(error, match=message):
        DerivativeLoss()(*arguments, **options)


@pytest.mark.parametrize(("scheme", "step"), [("forward", 1), ("sum", 1), ("central", 2), ("laplacian", 2)])
@pytest.mark.parametrize("max_order", [0, 1, 2])
def test_the_sparsity_order_must_leave_a_channel(scheme, step, max_order):
    taken = (max_order + 1) * step
    loss = DerivativeLoss(max_order=max_order, scheme=scheme)
    labels = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=f"(?s)feats.*{taken}.*{scheme}.*D = {taken}"):
        loss(torch.ones(1, taken, 4), labels)
    assert loss(torch.ones(1, taken + 1, 4), labels).isfinite()


@pytest.mark.parametrize("ignore_index", [255, -1, -100])
def test_negative_labels_are_refused_unless_ignored(ignore_index):
    labels = LABELS.clone()
    labels[1, 2, 3] = -2
    with pytest.raises(ValueError, match=rf"target.*labels.*ignore_index = {ignore_index}.*-2"):
        DerivativeLoss(ignore_index=ignore_index)(FEATS, labels)
    labels[1, 2, 3] = ignore_index
    assert DerivativeLoss(ignore_index=ignore_index)(FEATS, labels).isfinite()


def test_dtypes_may_differ_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert DerivativeLoss()(FEATS, FEATS.bfloat16().sin()).isfinite()


@pytest.mark.parametrize("norm", ["l1", "frobenius"])
def test_what_is_refused_at_construction_never_gets_to_a_call(norm):
    # The other values of the two options in conflict are fine.
    for options in ({"backend": "auto"}, {"backend": "tiled"}, {"num_anchors": None}):
        assert DerivativeLoss(norm=norm, **options)(FEATS, LABELS).isfinite()


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton may run here")
@pytest.mark.parametrize("num_anchors", [None, 4])
def test_a_backend_that_cannot_run_here_is_an_error_at_the_call(num_anchors):
    loss = DerivativeLoss(backend="triton", num_anchors=num_anchors)
    with pytest.raises(ValueError, match=r"backend=.triton. .*cpu"):
        loss(FEATS, LABELS)

"""mIoU, accuracy and boundary IoU from counts that add over images, and differences with their standard errors."""

import numpy as np
from scipy.ndimage import distance_transform_cdt, maximum_filter, minimum_filter
from torch import Tensor

from .data import VOID
from .evaluate import jackknife_error

BANDS = (0.02, 0.005)  # of the diagonal; Cheng et al. take the first
SCORES = ("mIoU", "accuracy", *(f"boundary IoU, {100 * share:g} %" for share in BANDS))


def inner_distance(labels: np.ndarray) -> np.ndarray:
    """(H, W): the steps, diagonal ones too, from each pixel to another class or out of the image.

    That is one more than to the nearest pixel with a neighbour of another class.
    """
    low, high = (extreme(labels, 3, mode="constant", cval=-1) for extreme in (minimum_filter, maximum_filter))
    return 1 + distance_transform_cdt(low == high, "chessboard")


def count(labels: Tensor, truth: Tensor, num_classes: int) -> np.ndarray:
    """The confusion matrix and, for each of `BANDS`, intersection and union of every class's band, in one row.

    The band of a class are its pixels at most so far from its contour. Void of the truth is void of the prediction.
    """
    valid = (truth != VOID).numpy()
    pair = [x.numpy() for x in (truth, labels.where(truth != VOID, VOID))]

    def counted(ids: np.ndarray, where: np.ndarray, length: int = num_classes) -> np.ndarray:
        return np.bincount(ids[where], minlength=length)

    rows = [counted(num_classes * pair[0] + pair[1], valid, num_classes**2)]
    distances = [inner_distance(x) for x in pair]
    for share in BANDS:
        width = max(1, round(share * float(np.hypot(*truth.shape))))
        one, other = (valid & (distance <= width) for distance in distances)
        both = counted(pair[0], one & other & (pair[0] == pair[1]))
        rows += [both, counted(pair[0], one) + counted(pair[1], other) - both]
    return np.concatenate(rows)


def scores_of(counts: np.ndarray, num_classes: int) -> np.ndarray:
    """`SCORES` (..., 4) in percent of counts (..., K); classes that are nowhere do not enter the means."""
    confusion = counts[..., : num_classes**2].reshape(*counts.shape[:-1], num_classes, num_classes)
    bands = counts[..., num_classes**2 :].reshape(*counts.shape[:-1], len(BANDS), 2, num_classes)
    inside = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - inside
    means = [
        np.nanmean(np.where(whole > 0, part / np.maximum(whole, 1), np.nan), -1)
        for part, whole in ((inside, union), *((bands[..., i, 0, :], bands[..., i, 1, :]) for i in range(len(BANDS))))
    ]
    accuracy = inside.sum(-1) / confusion.sum((-2, -1)).clip(1)
    return 100 * np.stack((means[0], accuracy, *means[1:]), -1)


def compared(counts: np.ndarray, control: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The difference of `SCORES`, averaged over networks, and its standard error over images by the jackknife.

    Args:
        counts: (networks, images, K) of one method.
        control: of another, on the same images.
        num_classes: C.
    """

    def without(x: np.ndarray) -> np.ndarray:
        return scores_of(x.sum(1, keepdims=True) - x, num_classes)

    difference = (scores_of(counts.sum(1), num_classes) - scores_of(control.sum(1), num_classes)).mean(0)
    left = (without(counts) - without(control)).mean(0)
    return difference, jackknife_error(left)

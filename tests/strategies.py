"""Hypothesis strategies. Entries are small integers or dyadic, so that float64 differences of them are exact."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from .oracles.features import SCHEMES, STEP

seeds = st.integers(0, 2**31 - 1)


@st.composite
def operators(draw, schemes=SCHEMES, min_order=0, max_order=4, max_channels=14):
    """(D, order, scheme) with `order * step < D`, the smallest D included."""
    scheme = draw(st.sampled_from(schemes))
    order = draw(st.integers(min_order, max_order))
    smallest = order * STEP[scheme] + 1
    D = draw(st.integers(smallest, max(smallest, max_channels)))
    return D, order, scheme


def integer_features(D, M):
    """(D, M) float64 arrays of small integers: sums and differences are exact, ties and zeros are common."""
    elements = st.integers(-4, 4).map(float)
    return hnp.arrays(np.float64, (D, M), elements=elements)


@st.composite
def adversarial_features(draw, D, M):
    """(D, M) features whose columns are the extreme cases of norms and derivatives, each with its own scale."""
    columns = []
    for _ in range(M):
        kind = draw(st.sampled_from(["random", "alternating", "one-hot", "constant", "zero", "ramp", "step"]))
        d = np.arange(D)
        at = draw(st.integers(0, D - 1))
        column = {
            "random": np.random.default_rng(draw(seeds)).standard_normal(D),
            "alternating": (-1.0) ** d,
            "one-hot": (d == at).astype(float),
            "constant": np.ones(D),
            "zero": np.zeros(D),
            "ramp": d.astype(float),
            "step": (d >= at).astype(float),
        }[kind]
        columns.append(column * draw(st.sampled_from([-1.0, 0.125, 1.0, 8.0])))
    return np.stack(columns, axis=1)

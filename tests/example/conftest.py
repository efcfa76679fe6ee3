"""What all tests of the example share."""

import pytest
from matplotlib.figure import Figure

SAVE_FIGURE = Figure.savefig


@pytest.fixture(scope="package", autouse=True)
def _no_pictures():
    """Rendering takes two thirds of a tiny run, so none is written here unless a test asks for `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **options: None)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Render pictures as a run does."""
    monkeypatch.setattr(Figure, "savefig", SAVE_FIGURE)

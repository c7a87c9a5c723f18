"""What the tests of figures share."""

import pytest

from ivcr_jax.metrics import interval


@pytest.fixture(scope="module")
def fewer_resamples():
    """A tenth of the work, where intervals are not what is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interval, "RESAMPLES", 200)
        patch.setattr(interval, "FLIPS", 1000)
        yield

"""What the tests of both kernels share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked_shapes():
    """Without jaxtyping's own checks, as users run it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

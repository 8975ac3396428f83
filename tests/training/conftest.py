import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _any_precision():
    """Allows each test to set a precision, which accelerate otherwise sets once in a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

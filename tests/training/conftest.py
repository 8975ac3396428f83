import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _any_precision():
    """Lets each test choose a precision; accelerate fixes it with the first call in a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

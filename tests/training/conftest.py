import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _any_precision():
    """accelerate fixes the precision with the first call in a process; here each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

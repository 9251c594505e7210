"""One setting for all tests: runs are reproducible, and no test asserts a time."""

import pytest
import torch
from hypothesis import settings

# Several threads of several test processes would spend their time waiting for each other.
torch.set_num_threads(1)

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")


@pytest.fixture
def threads():
    """Sets torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

"""What tests of models share: the kernels run in two threads, where others have one (tests/conftest.py)."""

from collections.abc import Iterator

import pytest
import torch

OF_KERNELS = ("test_kernels", "test_lmu", "test_gated_deltanet", "test_mamba2", "test_gated_norm", "test_short_convolution")


@pytest.fixture(autouse=True, scope="module")
def _two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads divide the rows and channels of a kernel, and add up what they have found."""
    before = torch.get_num_threads()
    if request.module.__name__ in OF_KERNELS:
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

import pytest
import torch


@pytest.fixture(scope='session', autouse=True)
def gpu():
    """End the run with an error without a GPU, because skipped tests would look like a success."""
    if not torch.cuda.is_available():
        pytest.exit('these tests need a CUDA GPU, and PyTorch finds none: run them on a machine with one', 1)

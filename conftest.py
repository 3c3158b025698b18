"""Fixtures that tests in several folders use."""

import pytest
import torch

from tests.helpers import write_tiny_corpus


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A corpus of nine short utterances by three speakers; not to be changed by a test."""
    return write_tiny_corpus(tmp_path_factory.mktemp("tiny_corpus"))


@pytest.fixture(autouse=True)
def _seeded():
    """Tests don't depend on their order; their tensors are too small for several threads."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu(request):
    """Only tests/test_gpu.py sees a GPU: other tests compare bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "tests.test_gpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts
        yield

"""What every test shares: no network, few threads, and the embedded checkpoint loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def embedded():
    from utils import DEFAULT_MODEL, load_model

    return load_model(DEFAULT_MODEL, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def model(embedded):
    """The embedded network: float32, on the CPU, in eval mode. Shared: tests must not change it."""
    return embedded[0]


@pytest.fixture(scope="session")
def tokenizer(embedded):
    """The embedded tokenizer. Shared: tests must not change it."""
    return embedded[1]

"""What every test shares: no network, few threads, and the embedded checkpoint loaded once."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

import pytest
import torch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

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


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, for the tests of one file; without it they are skipped."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()

"""Use one thread per worker and a fixed seed before every test."""

from __future__ import annotations

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

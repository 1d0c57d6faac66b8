# SPDX-License-Identifier: Apache-2.0
"""Settings of the decoding tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A shared machine may stall any example. Settings are read where a test is
# decorated, so this has to come before the tests are imported.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to a thread pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

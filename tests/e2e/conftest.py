# SPDX-License-Identifier: Apache-2.0
"""Show what the server wrote when a test that uses it fails."""

from collections.abc import Iterator
from typing import Any

import pytest
from e2e.server import Server


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server):
        report.sections.append(("server log", server.log_tail()))

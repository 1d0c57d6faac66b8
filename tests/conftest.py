# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

from hypothesis import settings

# A shared machine may stall any example. Settings are read where a test is
# decorated, so this has to come before the tests are imported.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

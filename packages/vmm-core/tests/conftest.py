"""What the tests of this package share."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# Test files are imported one by one (import mode importlib): the helpers beside them are found here.
sys.path.insert(0, str(Path(__file__).parent))

# How long an example takes tells of the machine and what else runs on it: a test's own time limit is what ends one that hangs.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

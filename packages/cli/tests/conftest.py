"""What the tests of this package share."""

from __future__ import annotations

import sys
from pathlib import Path

# Test files are imported one by one (import mode importlib): the helpers beside them are found here.
sys.path.insert(0, str(Path(__file__).parent))

"""What every test beyond a single package shares: the lab's helpers can be imported (`from lab.vmm import Qmp`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

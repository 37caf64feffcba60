"""Tests of the lab that boot it: they need QEMU and root, not KVM. Run by `tox -e lab`, a few seconds each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

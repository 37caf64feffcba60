"""`python -m block_qcow2.img`: stratovirt-img."""

import sys

from . import main

sys.exit(main())

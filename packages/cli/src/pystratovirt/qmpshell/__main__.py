"""`python -m pystratovirt.qmpshell` is the command `qmp`."""

from pystratovirt.qmpshell.main import main

raise SystemExit(main())

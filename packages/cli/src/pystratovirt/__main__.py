"""`python -m pystratovirt` is the command stratovirt."""

from pystratovirt.main import main

raise SystemExit(main())

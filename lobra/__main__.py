"""`python -m lobra`."""

import sys

from lobra.cli import main

sys.exit(main())

"""`python -m fedgan.cli`: the same as `fedgan`."""

import sys

from fedgan.cli import main

sys.exit(main())

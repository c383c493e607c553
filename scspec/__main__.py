"""`python -m scspec`: the command line of `scspec.cli`."""

import sys

from scspec.cli import main

sys.exit(main())

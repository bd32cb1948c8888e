"""`python -m hf_slim.cli` runs the command, too."""

import sys

from .command import main

sys.exit(main())

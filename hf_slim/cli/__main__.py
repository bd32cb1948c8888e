"""`python -m hf_slim.cli` runs the command, too."""

import sys

from .hf_slim_command import main

sys.exit(main())

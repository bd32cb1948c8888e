"""The door of the `hf-slim` command, which answers usage and mistakes without the seconds that PyTorch takes.

It is installed beside the package, since to import anything in the package is to import hf_slim with its hooks.
"""

from .command import main

"""Ways out of PyTorch: files for other runtimes, and models that these would get wrong are refused.

What needs nothing of ours (ONNX, OpenVINO, ExecuTorch, quantization) is on the page "Every way out".
"""

from .gguf_file import export_gguf
from .open_ways import WayOut, find_ways_out
from .paged_cache import refuse_other_groups

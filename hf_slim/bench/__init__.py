"""`hf-slim bench`: what slimming costs and saves. It needs the extra `bench`."""

from .benchmark import run_bench
from .flags import BenchArguments

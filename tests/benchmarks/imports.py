"""What `import hf_slim` adds to `import transformers`, each in fresh processes by turns.

`python tests/benchmarks/imports.py` prints the median milliseconds of both.
"""

import statistics
import subprocess
import sys

CODE = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
IMPORTS = ("transformers", "transformers, hf_slim")
REPEATS = 9


def main() -> None:
    """Measure and print."""
    seconds: dict[str, list[float]] = {names: [] for names in IMPORTS}
    for _ in range(REPEATS):
        for names in IMPORTS:
            done = subprocess.run(
                [sys.executable, "-c", CODE.format(names)], capture_output=True, text=True, check=True
            )
            seconds[names].append(float(done.stdout))
    for names, values in seconds.items():
        print(f"import {names}: {1000 * statistics.median(values):.0f} ms")


if __name__ == "__main__":
    main()

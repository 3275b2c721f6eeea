"""The tiny runs of tests/integration, the benchmarks' count of what crosses between processes, and
what DeepSpeed builds for a CPU: kept, as it takes half a minute, where other caches of tests are
not."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "integration"), str(ROOT / "benchmarks")]
built = Path.home() / ".cache" / "torch_extensions"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))

"""The tiny runs of tests/integration, and what DeepSpeed builds for a CPU: kept, as it takes half a
minute, where other caches of tests are not."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
built = Path.home() / ".cache" / "torch_extensions"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))

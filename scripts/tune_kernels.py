"""Finds the fastest configurations of the Hopper kernels on this machine's GPU: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

if __name__ == "__main__":
    from kernels_pallas.grouped_matmul.mosaic_gpu import tune

    sys.exit(tune.main())

"""One thread per process: the tensors are tiny, and waiting threads would slow down whatever else runs on the machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

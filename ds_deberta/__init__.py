"""Pre-training of DeBERTa on DeepSpeed."""

import os

__version__ = "0.1.0"

# Before torch loads OpenMP: its threads else spin for so long at every barrier that one other busy
# process makes small models ten times slower. On an idle machine this costs nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

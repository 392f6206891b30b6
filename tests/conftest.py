"""What every test needs before torch is imported."""

import os

# The models here are so small that a second thread costs more than it brings, and server processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import os

# one thread a test process (pytest -n starts several): many small problems; and processes forked below must not meet a thread pool
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)

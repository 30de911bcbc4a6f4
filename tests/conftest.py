import torch

torch.set_num_threads(1)  # many small problems; and processes forked below must not meet a thread pool

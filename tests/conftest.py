"""One thread and reproducible examples for the whole run. This folder is on sys.path, so tests import `analytic`."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fastdiff", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fastdiff")

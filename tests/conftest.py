import os

os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "numba"))

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

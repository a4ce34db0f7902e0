"""What holds for all tests."""

import os

# A process that is forked after torch has started threads hangs where it needs them; before the first import of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

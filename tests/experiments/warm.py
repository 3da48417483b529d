"""What the server does once, before it forks: load what a run loads, by making one.

No GPU is seen: autograd's threads, which cannot be forked, are for devices.
"""

import os
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from tests.experiments.processes import make, small

with tempfile.TemporaryDirectory() as root:
    make(small(), Path(root))

"""Import this before torch: its threads, by default, spin while they wait for one another, and take the time from
whoever else could use it: decoding workers, the thread that reads ahead, another training on the same machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

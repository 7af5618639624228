"""Import this before torch. Its threads, by default, spin for milliseconds while they wait for one another, and take
the time from whoever else could use it: decoding workers, the thread that reads ahead, another program (a training
beside a busy process took ten times as long). A short spin costs nothing measurable on an idle machine; none at all
(OMP_WAIT_POLICY=PASSIVE) made small training steps half as slow again."""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

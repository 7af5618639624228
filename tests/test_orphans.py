"""Processes that a killed command started end, too, even where it was killed before they could ask for that."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import ENVIRONMENT, ROOT, lives

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes live")

# A decoding process that is so slow to start that its parent is gone when it asks to end with it.
LATE = """
    import os, sys, time
    from pathlib import Path
    import torch
    from feats.extraction.preparation import prepare

    main, ask = os.getpid(), torch.multiprocessing._prctl_pr_set_pdeathsig

    def late(number):
        Path(sys.argv[1]).write_text(str(os.getpid()))
        while os.getppid() == main:
            time.sleep(0.01)
        ask(number)

    torch.multiprocessing._prctl_pr_set_pdeathsig = late
    next(prepare([0, 1], 1, pin_memory=False))
"""


def test_a_decoding_process_that_starts_when_its_parent_is_killed(tmp_path: Path):
    told = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", dedent(LATE), str(told)], cwd=ROOT, env=ENVIRONMENT)
    while not (told.exists() and told.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    worker = int(told.read_text())
    assert lives(worker)
    process.kill()
    process.wait()
    limit = time.monotonic() + 20
    while lives(worker) and time.monotonic() < limit:
        time.sleep(0.01)
    if lives(worker):
        os.kill(worker, signal.SIGKILL)
        pytest.fail("it waits for work for ever")

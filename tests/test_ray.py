"""Extraction by workers on a Ray cluster: the bytes of a plain extraction, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, make_course

from feats.extraction.leases import holder_of

pytest.importorskip("ray", reason="Ray isn't installed: pip install -e '.[ray]'")
pytestmark = pytest.mark.slow  # a cluster takes ten seconds to start

SCRIPT = ROOT / "feats" / "vader_extract_feats.py"
ROWS, PIECE = 1500, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ray")
    make_course(place / "data", rows=ROWS)
    ran = extraction(place, "--out", "plain").wait()
    assert ran == 0
    return place


def extraction(place: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), "--batch-size", "8", *options]
    return subprocess.Popen(
        command, cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def digest(place: Path, out: str) -> str:
    return sha256((place / out / "vader_train.h5").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head with room for one worker.

    Ray's workers are of niceness 15: beside other tests they'd get a thirtieth of a core.
    """
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "_system_config": {"worker_niceness": 0}}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def wait_for_parts(place: Path, out: str, count: int, running: subprocess.Popen) -> None:
    while len(list((place / out / "vader_train.parts").glob("part-*.h5"))) < count:
        assert running.poll() is None, "it ended before it could be disturbed"
        time.sleep(0.02)


def finished(running: subprocess.Popen) -> str:
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    return out


def test_two_nodes_and_one_killed_in_the_middle(folder: Path, cluster):
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    running = extraction(
        folder, "--out", "nodes", "--engine", "ray", "--address", cluster.address, "--piece-rows", str(PIECE)
    )
    wait_for_parts(folder, "nodes", 4, running)
    cluster.remove_node(node, allow_graceful=False)
    said = finished(running)
    assert f"{ROWS} rows done" in said
    assert digest(folder, "nodes") == digest(folder, "plain")


def test_a_worker_killed_in_the_middle(folder: Path, cluster):
    running = extraction(
        folder, "--out", "worker", "--engine", "ray", "--address", cluster.address, "--piece-rows", str(PIECE)
    )
    wait_for_parts(folder, "worker", 4, running)
    os.kill(a_worker(folder / "worker" / "vader_train.parts"), signal.SIGKILL)
    finished(running)
    assert digest(folder, "worker") == digest(folder, "plain")


def a_worker(parts: Path) -> int:
    """The process that works on a part: one of Ray's."""
    while not (holders := [holder for lease in parts.glob("part-*.lease") if (holder := holder_of(lease))]):
        time.sleep(0.01)  # between two parts
    pid = holders[0].pid
    assert "ray::" in Path(f"/proc/{pid}/cmdline").read_text()
    return pid


@pytest.mark.parametrize(
    ("options", "says"),
    [
        # How many CPUs it has isn't said here: a node that an earlier test killed counts until Ray misses it.
        (["--gpus-per-worker", "1"], " CPU, 0 GPU; ask for less"),
        (["--model", "nonsense"], "nonsense"),
    ],
)
def test_what_can_t_be_is_one_line(options: list[str], says: str, folder: Path, cluster):
    running = extraction(folder, "--out", "none", "--engine", "ray", "--address", cluster.address, *options)
    _, err = running.communicate(timeout=240)
    assert running.returncode == 2 and "Traceback" not in err
    assert says in err.splitlines()[-1]

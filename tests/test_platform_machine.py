"""What runs know of their machines, and runs whose process died without saying so."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from processes import wait_for

from pixart_platform.machine import describe_machine, list_packages, watched
from pixart_platform.tracking import Tracker, bury, read_run, sqlite_uri


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker.start(sqlite_uri(tmp_path), "mini", "a", "a", artifacts=tmp_path)


def test_a_machine_is_described_by_what_matters() -> None:
    told = describe_machine()
    assert told["hardware.cpus"] == str(os.cpu_count())
    assert float(told["hardware.memory_gib"]) > 0
    assert f"torch=={told['environment.torch']}\n" in list_packages()


def test_a_machine_that_is_watched_logs_how_busy_it_is(tracker: Tracker) -> None:
    with watched((tracker.uri, tracker.run_id), 0.05):
        wait_for(lambda: bool(read_run(tracker.uri, tracker.run_id).metrics), "a sample")
    found = {name.rpartition("/")[2] for name in read_run(tracker.uri, tracker.run_id).metrics}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes"} <= found


def test_a_lost_server_costs_samples_and_nothing_else(tracker: Tracker, tmp_path: Path) -> None:
    broken = tmp_path / "not a folder"
    broken.touch()
    with watched((sqlite_uri(broken), tracker.run_id), 0.01):
        time.sleep(0.1)


DIES = """
import sys, time
from pathlib import Path
from pixart_platform.tracking import Tracker
Tracker.start(sys.argv[1], "mini", "dies", "dies", artifacts=Path(sys.argv[2]))
print("started", flush=True)
time.sleep(600)
"""


def test_a_run_whose_process_was_killed_is_marked_and_others_are_left(
    tracker: Tracker, tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", DIES, tracker.uri, tmp_path], stdout=subprocess.PIPE
    )
    assert child.stdout
    assert child.stdout.readline() == b"started\n"
    assert bury(tracker.uri, "mini") == [], "both live"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    [dead] = bury(tracker.uri, "mini")
    client = MlflowClient(tracker.uri)
    assert client.get_run(dead).info.status == "KILLED"
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    assert bury(tracker.uri, "mini") == []
    assert bury(tracker.uri, "nobody's") == []
    again = Tracker.start(tracker.uri, "mini", "dies", "dies", artifacts=tmp_path)
    assert again.run_id == dead, "taken up again, it goes on as one run"
    assert client.get_run(dead).info.status == "RUNNING"

"""Real processes for the slow tests: run the command line, find workers, kill, look around; and a
monitor for those that call a pipeline themselves."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
MINI = REPOSITORY / "tests" / "recipes" / "mini.yaml"
PIXART = [sys.executable, "-m", "pixart_cluster.cli"]


def start(*arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
    """Start ``pixart`` with its output in ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [*PIXART, *map(str, arguments)], stdout=output, stderr=subprocess.STDOUT
        )


def run(*arguments: str | Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run ``pixart`` to its end."""
    return subprocess.run(
        [*PIXART, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
    """Poll closely until ``condition`` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(0.002)


def train_workers(driver: int) -> list[psutil.Process]:
    """The training workers below a driver process."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)


def kill_family(pid: int) -> None:
    """Kill a process and everything below it at once, as when their machine is lost."""
    for process in family(pid):
        with suppress(ProcessLookupError):
            kill(process)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@contextmanager
def repeatedly(work: Callable[[int], None]) -> Iterator[list[int]]:
    """Somebody who works on beside the block: ``work(1)``, ``work(2)``, ...; how many are done."""
    done, stop = [0], threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            work(done[0] + 1)
            done[0] += 1

    worker = threading.Thread(target=go_on)
    worker.start()
    try:
        yield done
    finally:
        stop.set()
        worker.join()


def count_alive(processes: list[psutil.Process]) -> int:
    return sum(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def is_orphan_of_ray(process: psutil.Process) -> bool:
    """Whether it is Ray's, and its driver is gone; other programs' Ray has a driver that lives."""
    try:
        if "ray" not in process.name():
            return False
        above = [parent for parent in process.parents() if "ray" not in parent.name()]
    except psutil.NoSuchProcess:
        return False
    return not above or above[0].pid == 1


class Silence:
    """A monitor that shows no progress."""

    @contextmanager
    def job(self, name: str, total: int, unit: str) -> Iterator["Silence"]:
        yield self

    def reach(self, done: int) -> None:
        pass

    def note(self, message: str) -> None:
        print(f"           {message}")

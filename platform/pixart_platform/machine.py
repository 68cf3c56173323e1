"""What a run is told of the machines it runs on: hardware, packages, and how busy they are."""

import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions, version
from typing import Any

import psutil
import ray
import torch

from pixart_platform.errors import TrackingError
from pixart_platform.tracking import SUBMISSION, Tracker, quiet_mlflow

_INTERVAL_SECONDS = 10.0
_PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "mlflow")
_log = logging.getLogger(__name__)


def describe_machine() -> dict[str, str]:
    """Tags of a run: what its driver runs on, with the versions that matter most, and by what name
    Ray's logs and metrics call it."""
    submission = os.environ.get(SUBMISSION)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "hardware.cpus": str(os.cpu_count()),
        "hardware.memory_gib": f"{psutil.virtual_memory().total / 2**30:.0f}",
        "hardware.gpus": ", ".join(gpus) or "none",
        "environment.python": platform.python_version(),
        **{f"environment.{name}": version(name) for name in _PACKAGES},
        **({"ray.job": ray.get_runtime_context().get_job_id()} if ray.is_initialized() else {}),
        **({"ray.submission": submission} if submission else {}),
    }


def list_packages() -> str:
    """Every installed package as ``name==version``, a line each."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


@contextmanager
def watched(place: tuple[str, str], interval_seconds: float = _INTERVAL_SECONDS) -> Iterator[None]:
    """Log this machine's processors, disks, network and GPUs (with their power) to a run.

    ``place`` is the tracking address and the run's id; metrics are ``system/HOST/...``, stepped in
    seconds since the run began. What cannot be logged is left out: nothing depends on it.
    """
    done = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(place, interval_seconds, done), name="watch-machine", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()


def _watch(place: tuple[str, str], interval_seconds: float, done: threading.Event) -> None:
    monitors, prefix = _monitors(), f"system/{socket.gethostname()}/"
    tracker: Tracker | None = None
    while not done.wait(interval_seconds):
        found: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        try:
            tracker = tracker or Tracker(*place)
            seconds = int(time.time() - tracker.began)
            tracker.log_metrics({prefix + name: value for name, value in found.items()}, seconds)
        except TrackingError as error:
            tracker = None
            _log.debug("%s; a sample of this machine is left out", error)


def _monitors() -> list[Any]:
    """MLflow's own, which have no types."""
    quiet_mlflow()
    from mlflow.system_metrics.metrics import (
        cpu_monitor,
        disk_monitor,
        gpu_monitor,
        network_monitor,
    )

    kinds: list[Any] = [
        cpu_monitor.CPUMonitor, disk_monitor.DiskMonitor, network_monitor.NetworkMonitor
    ]  # fmt: skip
    gpus: Any = gpu_monitor.GPUMonitor
    made = [kind() for kind in kinds]
    try:
        return [*made, gpus()]
    except Exception:  # it raises a bare ImportError or RuntimeError where there is no GPU
        return made

"""The Ray that work runs on: the cluster that RAY_ADDRESS names, or one of our own.

Our own is on this machine and leaves nothing behind: its sessions, logs and sockets live in a short
temporary folder (socket paths are limited to 107 bytes), removed at the end; if the work fails, the
logs are kept beside it first. On a cluster the run's folder must be one that all nodes share:
partitions, states and drawings are written there by whoever makes them.
"""

import logging
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pixart_platform.errors import PixartError

SCRATCH_PREFIX = "pixart-"
MIN_CPUS = 4  # logical: two workers and a replica share two cores when they must
_STARTS = 3  # of Ray, where the machine is busy
_LOOK_SECONDS = 60.0  # for a node to start a process and look


class RayError(PixartError):
    """A cluster that cannot be joined, or on which a run cannot work."""


def quiet_environment() -> None:
    """Settle chatty libraries before they are imported; a user's own settings win."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # also for whatever imports it in a worker
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",  # else Ray's C++ core writes notices over our lines
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # else workers outlive a killed driver 60 s
        "RAY_worker_niceness": "0",  # Ray's 15 starves training beside any other program
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def some_ray(root: Path) -> Iterator[Path]:
    """Ray for the block, on which a run kept in ``root`` works; yields a scratch folder that is
    gone afterwards.

    Raises RayError for a cluster that cannot be reached, or one whose nodes do not share ``root``.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        with local_ray(root / "logs") as scratch:
            yield scratch
        return
    import ray

    if "://" in address:
        raise RayError(
            f"RAY_ADDRESS={address}: work joins a cluster by HOST:6379; to hand it one over HTTP, "
            f"`pixart submit` with RAY_API_SERVER_ADDRESS"
        )
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            told = str(error).strip().partition("\n")[0]
            raise RayError(f"RAY_ADDRESS={address}: {told}") from error
        _quiet_ray_data()
        check_shared(root)
        yield scratch
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def check_shared(root: Path) -> None:
    """Raise RayError unless every node of Ray's cluster sees ``root``."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    root.mkdir(parents=True, exist_ok=True)
    marker = root / f".seen-{secrets.token_hex(4)}"
    marker.touch()
    look = ray.remote(num_cpus=0, max_retries=0)(_exists)
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has types in parts
    alive = [node for node in nodes if node["Alive"]]
    asked = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(str(marker)): node["NodeManagerAddress"]
        for node in alive
    }
    try:
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_SECONDS)
        blind = []
        for ref in answered:
            with suppress(ray.exceptions.RayError):  # a node that goes just now is no obstacle
                if not ray.get(ref):
                    blind.append(asked[ref])
    finally:
        marker.unlink(missing_ok=True)
    if blind:
        raise RayError(
            f"{root}: the nodes {', '.join(sorted(blind))} do not see it; keep runs in a folder "
            f"that all nodes share (NFS, EFS, FSx)"
        )


def _exists(path: str) -> bool:
    return Path(path).exists()


@contextmanager
def local_ray(logs_to: Path) -> Iterator[Path]:
    """Start Ray for the block; yields a scratch folder that is gone afterwards.

    If the block raises, Ray's logs are copied to ``logs_to``. Raises RayError if it does not start.
    """
    import ray
    import ray.data

    _remove_stale()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to HOME
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
    try:
        _start(scratch / "ray")
        _quiet_ray_data()
        yield scratch
    except BaseException:
        _keep_logs(scratch, logs_to)
        raise
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _start(folder: Path) -> None:
    """Ray gives its own agent 20 seconds to start, which a machine at four times its load needs."""
    import ray

    for _ in range(_STARTS):
        try:
            ray.init(
                num_cpus=max(MIN_CPUS, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
        except Exception as error:  # Ray's Node raises no narrower one; all others go on up
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
        else:
            return
    raise RayError(
        f"Ray did not start in {_STARTS} tries; this machine is busy (load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores): try again when it is less so"
    )


def _quiet_ray_data() -> None:
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray's own; whoever else listens hears all
            handler.setLevel(logging.CRITICAL)  # errors are raised; plans are not for our users


def _keep_logs(scratch: Path, logs_to: Path) -> None:
    logs = scratch / "ray" / "session_latest" / "logs"
    if logs.is_dir():
        shutil.rmtree(logs_to, ignore_errors=True)
        shutil.copytree(logs, logs_to, ignore_dangling_symlinks=True)


def _remove_stale() -> None:
    """Scratch folders whose process was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*-*"):
        match = re.fullmatch(rf"{SCRATCH_PREFIX}(\d+)-\w+", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)

"""A Ray of one's own on this machine, which leaves nothing behind.

Ray's sessions, logs and sockets live in a short temporary folder (socket paths are limited to 107
bytes), removed at the end; if the work fails, the logs are kept beside it first.
"""

import logging
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "pixart-"
_MIN_CPUS = 4  # logical: two workers and a replica share two cores when they must


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
def local_ray(logs_to: Path) -> Iterator[Path]:
    """Start Ray for the block; yields a scratch folder that is gone afterwards.

    If the block raises, Ray's logs are copied to ``logs_to``.
    """
    import ray
    import ray.data

    _remove_stale()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to HOME
    scratch = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        ray.init(
            num_cpus=max(_MIN_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(scratch / "ray"),
        )
        for handler in logging.getLogger("ray.data").handlers:
            if type(handler).__name__ != "SessionFileHandler":
                handler.setLevel(logging.ERROR)  # the plan of each dataset is not for our users
        yield scratch
    except BaseException:
        _keep_logs(scratch, logs_to)
        raise
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _keep_logs(scratch: Path, logs_to: Path) -> None:
    logs = scratch / "ray" / "session_latest" / "logs"
    if logs.is_dir():
        shutil.rmtree(logs_to, ignore_errors=True)
        shutil.copytree(logs, logs_to, ignore_dangling_symlinks=True)


def _remove_stale() -> None:
    """Scratch folders whose process was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        match = re.fullmatch(rf"{_PREFIX}(\d+)-\w+", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)

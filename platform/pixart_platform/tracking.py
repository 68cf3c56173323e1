"""Runs in MLflow: one pipeline run, a child for each job, metrics stepped in images seen.

The only file besides the registry that knows MLflow. Run ids are derived by tag, so a job that is
started again goes on in its own run with one unbroken curve.
"""

import json
import logging
import os
import queue
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pixart_platform.errors import PixartError, TrackingError
from pixart_platform.tables import Table

if TYPE_CHECKING:
    from mlflow import MlflowClient

IDENTITY_TAG = "pixart.identity"
SUBMISSION = "PIXART_SUBMISSION"  # in the environment of what `pixart submit` started
_OWNER = "pixart.owner"
_MAX_PARAM = 500
_BATCH = 100  # params that MLflow takes at a time
Point = tuple[int, dict[str, float]]  # images seen, and what was logged there
_log = logging.getLogger(__name__)


def quiet_mlflow() -> None:
    """Set before mlflow is imported: no telemetry, no chatter from its migrations."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(uri: str) -> "MlflowClient":
    """A client of the store at ``uri``. Raises TrackingError if it cannot be opened."""
    quiet_mlflow()
    from mlflow import MlflowClient

    with reachable(uri):
        return MlflowClient(uri)


@contextmanager
def reachable(
    uri: str, what: str = "MLflow", kind: type[PixartError] = TrackingError
) -> Iterator[None]:
    """What MLflow and its database raise when they cannot answer becomes one line of ``kind``."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        told = str(error).strip().splitlines()[0]
        code = getattr(error, "error_code", "")
        if code == "UNAUTHENTICATED":
            told = (
                "it does not know who asks; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD in the environment"
            )
        elif code == "PERMISSION_DENIED":
            told = "this user may not do that; let an administrator of it grant the permission"
        elif isinstance(error, ImportError):
            told += "; install psycopg2-binary, and write postgresql+psycopg2://"
        told = f"{what} at {uri}: {told}"  # which may name it again
        raise kind(told.replace(uri, hide_password(uri))) from error


def hide_password(uri: str) -> str:
    """``uri`` as it may be shown: ``postgresql://user:***@host/db``."""
    return re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", uri)


def sqlite_uri(folder: Path) -> str:
    """The embedded store of one person: ``folder/mlflow.db``."""
    return f"sqlite:///{folder / 'mlflow.db'}"


class Tracker:
    """Logs to one run. Cheap to make anywhere from (uri, run_id)."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = connect(uri)
        self._logged: dict[int, float] | None = None  # losses of the curve that is caught up

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        identity: str,
        name: str,
        *,
        artifacts: Path,
        parent: "Tracker | None" = None,
        params: Mapping[str, Any] | None = None,
    ) -> "Tracker":
        """The run with this ``identity`` in ``experiment``: found and reopened, or created."""
        from mlflow.entities import Param

        client = connect(uri)
        with reachable(uri):
            found = client.get_experiment_by_name(experiment)
            remote = uri.startswith(("http://", "https://"))  # a server has a place of its own
            location = None if remote else (artifacts / "artifacts").as_uri()
            where = found.experiment_id if found else client.create_experiment(experiment, location)
            runs = client.search_runs(
                [where], f"tags.`{IDENTITY_TAG}` = '{identity}'", max_results=1
            )
            if runs:
                client.update_run(runs[0].info.run_id, status="RUNNING")
                client.set_tag(runs[0].info.run_id, _OWNER, _this_process())
                return cls(uri, runs[0].info.run_id)
            tags = {
                IDENTITY_TAG: identity, _OWNER: _this_process(), "mlflow.runName": name,
                "mlflow.source.name": "pixart",
            }  # fmt: skip
            if parent:
                tags["mlflow.parentRunId"] = parent.run_id
            run = client.create_run(where, tags=tags, run_name=name)
            flat = [Param(k, str(v)[:_MAX_PARAM]) for k, v in _flatten(params or {}).items()]
            for first in range(0, len(flat), _BATCH):
                client.log_batch(run.info.run_id, params=flat[first : first + _BATCH])
            return cls(uri, run.info.run_id)

    @property
    def began(self) -> float:
        """When the run was first started, in Unix seconds."""
        with reachable(self.uri):
            return float(self._client.get_run(self.run_id).info.start_time) / 1000

    def log_metrics(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Log values at ``images_seen``, the step of every curve."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(k, float(v), now, images_seen) for k, v in metrics.items()]
        with reachable(self.uri):
            self._client.log_batch(self.run_id, metrics=entities)

    def catch_up(self, history: Iterable[Point]) -> None:
        """Log what of a curve is not there yet, so that a resumed run has each point once.

        A point whose loss is another, as after a rewind, is logged anew: the last one counts.
        """
        if self._logged is None:
            self._logged = dict(self.history("loss"))
        for images_seen, metrics in history:
            if self._logged.get(images_seen) != metrics["loss"]:
                self.log_metrics(metrics, images_seen)
                self._logged[images_seen] = metrics["loss"]

    def log_image(self, image: Any, key: str, images_seen: int) -> None:
        """A picture (H, W, 3) uint8 under ``key``, for MLflow's image grid."""
        with reachable(self.uri):
            self._client.log_image(self.run_id, image, key=key, step=images_seen, synchronous=True)

    def log_table(self, table: Table, context: str) -> None:
        """Record a table as this run's dataset, by folder and digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place = json.dumps({"uri": table.folder.uri})
        dataset = Dataset(table.folder.name, table.digest, "local", place)
        tag = InputTag("mlflow.data.context", context)
        with reachable(self.uri):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def log_file(self, path: Path) -> None:
        """Keep a file with this run, under its name."""
        with reachable(self.uri):
            self._client.log_artifact(self.run_id, str(path))

    def log_text(self, text: str, name: str) -> None:
        """Keep a text with this run, as file ``name``."""
        with reachable(self.uri):
            self._client.log_text(self.run_id, text, name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        with reachable(self.uri):
            self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(images seen, value) of a metric, in order; a repeated step keeps its last value."""
        with reachable(self.uri):
            found = self._client.get_metric_history(self.run_id, metric)
        points = {m.step: m.value for m in found}
        return sorted(points.items())

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        with reachable(self.uri):
            self._client.set_terminated(self.run_id, status)


def _this_process() -> str:
    """Names a process for good: no other has its host, number and birth."""
    return _process(psutil.Process())


def _process(process: psutil.Process) -> str:
    return f"{socket.gethostname()} {process.pid} {process.create_time():.2f}"


def bury(uri: str, experiment: str) -> list[str]:
    """Mark runs KILLED whose process is gone from this machine; returns their ids."""
    with reachable(uri):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        where = [found.experiment_id] if found else []
        host = socket.gethostname()
        running = client.search_runs(
            where, f"attributes.status = 'RUNNING' and tags.`{_OWNER}` LIKE '{host} %'"
        ) if where else []  # fmt: skip
        alive = {_process(p) for p in psutil.process_iter() if p.is_running()} if running else set()
        dead = [run.info.run_id for run in running if run.data.tags[_OWNER] not in alive]
        for run_id in dead:
            client.set_terminated(run_id, "KILLED")
    return dead


@dataclass(frozen=True)
class Record:
    """A run as it was logged; ``metrics`` has the last value of each."""

    run_id: str
    name: str
    parent: str
    """Id of the run it belongs to, or nothing."""
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def read_run(uri: str, run_id: str) -> Record:
    """Raises TrackingError for one that is not there."""
    with reachable(uri):
        run = connect(uri).get_run(run_id)
    tags = dict(run.data.tags)
    parent, name = tags.get("mlflow.parentRunId", ""), str(run.info.run_name)
    return Record(run_id, name, parent, dict(run.data.params), dict(run.data.metrics), tags)


def read_file(uri: str, run_id: str, name: str) -> bytes | None:
    """A file that was logged to a run, or None."""
    with reachable(uri), tempfile.TemporaryDirectory() as folder:
        client = connect(uri)
        where = name.rpartition("/")[0]
        if name not in {entry.path for entry in client.list_artifacts(run_id, where or None)}:
            return None
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


def read_images(uri: str, run_id: str) -> dict[str, bytes]:
    """The pictures that ``log_image`` logged, as PNG by key, each as of its last step."""
    with reachable(uri):
        names = [entry.path for entry in connect(uri).list_artifacts(run_id, "images")]
    last: dict[str, tuple[int, int, str]] = {}
    for name in names:
        if told := re.fullmatch(r"images/(.+?)\+step\+(\d+)\+timestamp\+(\d+)\+[\w-]+\.png", name):
            found = (int(told[2]), int(told[3]), name)
            last[told[1]] = max(found, last.get(told[1], found))
    found_bytes = (
        (key, read_file(uri, run_id, name)) for key, (_, _, name) in sorted(last.items())
    )
    return {key: data for key, data in found_bytes if data is not None}


def running(uri: str, experiment: str) -> list[dict[str, str]]:
    """The tags of every run of ``experiment`` that has not ended, as far as MLflow knows."""
    client, found, token = connect(uri), list[dict[str, str]](), ""
    with reachable(uri):
        where = client.get_experiment_by_name(experiment)
        while where:
            page = client.search_runs(
                [where.experiment_id], "attributes.status = 'RUNNING'", page_token=token or None
            )
            found += [dict(run.data.tags) for run in page]
            if not (token := page.token):
                break
    return found


class Outbox:
    """Logs a curve from a training worker in the background, however long MLflow is away.

    What it could not send is not lost: the curve is part of every saved state.
    """

    def __init__(self, uri: str, run_id: str, history: Iterable[Point]) -> None:
        """``history`` is what earlier attempts logged, or meant to."""
        self._place, self._waiting = (uri, run_id), list(history)
        self._queue: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="log-metrics", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: dict[str, float], images_seen: int) -> None:
        self._queue.put((images_seen, metrics))

    def close(self, patience_seconds: float = 30.0) -> None:
        """Send the rest, unless that takes too long."""
        self._queue.put(None)
        self._thread.join(patience_seconds)

    def _send(self) -> None:
        tracker: Tracker | None = None
        pause, ended = 1.0, False
        while not ended or self._waiting:
            if not ended and (not self._waiting or not self._queue.empty()):
                point = self._queue.get()
                ended = point is None
                self._waiting += [] if point is None else [point]
                continue
            try:
                tracker = tracker or Tracker(*self._place)
                tracker.catch_up(self._waiting)
                self._waiting, pause = [], 1.0
            except TrackingError as error:
                tracker = None  # what has arrived is asked anew
                _log.warning("%s; metrics are kept, next try in %.0f s", error, pause)
                time.sleep(pause)
                pause = min(2 * pause, 60.0)


def _flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

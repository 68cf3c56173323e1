"""Runs in MLflow: one pipeline run, a child for each job, metrics stepped in images seen.

The only file besides the registry that knows MLflow. Run ids are derived by tag, so a job that is
started again goes on in its own run with one unbroken curve.
"""

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_platform.errors import TrackingError
from pixart_platform.tables import Table

if TYPE_CHECKING:
    from mlflow import MlflowClient

_IDENTITY = "pixart.identity"
_MAX_PARAM = 500
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

    with _reachable(uri):
        return MlflowClient(uri)


@contextmanager
def _reachable(uri: str) -> Iterator[None]:
    """Turn what MLflow and its database raise when they cannot answer into a TrackingError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        told = f"MLflow at {uri}: {first}"  # which may name the address again
        raise TrackingError(told.replace(uri, hide_password(uri))) from error


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
        client = connect(uri)
        with _reachable(uri):
            found = client.get_experiment_by_name(experiment)
            location = (artifacts / "artifacts").as_uri()
            where = found.experiment_id if found else client.create_experiment(experiment, location)
            runs = client.search_runs([where], f"tags.`{_IDENTITY}` = '{identity}'", max_results=1)
            if runs:
                client.update_run(runs[0].info.run_id, status="RUNNING")
                return cls(uri, runs[0].info.run_id)
            tags = {_IDENTITY: identity, "mlflow.runName": name, "mlflow.source.name": "pixart"}
            if parent:
                tags["mlflow.parentRunId"] = parent.run_id
            run = client.create_run(where, tags=tags, run_name=name)
            for key, value in _flatten(params or {}).items():
                client.log_param(run.info.run_id, key, str(value)[:_MAX_PARAM])
            return cls(uri, run.info.run_id)

    def log_metrics(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Log values at ``images_seen``, the step of every curve."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(k, float(v), now, images_seen) for k, v in metrics.items()]
        with _reachable(self.uri):
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
        with _reachable(self.uri):
            self._client.log_image(self.run_id, image, key=key, step=images_seen, synchronous=True)

    def log_table(self, table: Table, context: str) -> None:
        """Record a table as this run's dataset, by folder and digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place = json.dumps({"uri": table.folder.uri})
        dataset = Dataset(table.folder.name, table.digest, "local", place)
        tag = InputTag("mlflow.data.context", context)
        with _reachable(self.uri):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        with _reachable(self.uri):
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, value)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(images seen, value) of a metric, in order; a repeated step keeps its last value."""
        with _reachable(self.uri):
            found = self._client.get_metric_history(self.run_id, metric)
        points = {m.step: m.value for m in found}
        return sorted(points.items())

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        with _reachable(self.uri):
            self._client.set_terminated(self.run_id, status)


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

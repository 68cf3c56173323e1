"""Runs in MLflow: one pipeline run, a child for each job, metrics stepped in images seen.

The only file besides the registry that knows MLflow. Run ids are derived by tag, so a job that is
started again goes on in its own run with one unbroken curve.
"""

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_platform.errors import PixartError
from pixart_platform.tables import Table

if TYPE_CHECKING:
    from mlflow import MlflowClient

_IDENTITY = "pixart.identity"
_MAX_PARAM = 500


def quiet_mlflow() -> None:
    """Set before mlflow is imported: no telemetry, no chatter from its migrations."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(uri: str) -> "MlflowClient":
    """A client of the store at ``uri``. Raises PixartError if it cannot be opened."""
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return MlflowClient(uri)
    except (MlflowException, SQLAlchemyError) as error:
        raise PixartError(
            f"MLflow at {hide_password(uri)}: {str(error).strip().splitlines()[0]}"
        ) from error


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
        from mlflow.exceptions import MlflowException

        try:
            found = client.get_experiment_by_name(experiment)
            location = (artifacts / "artifacts").as_uri()
            where = found.experiment_id if found else client.create_experiment(experiment, location)
            runs = client.search_runs([where], f"tags.`{_IDENTITY}` = '{identity}'", max_results=1)
        except MlflowException as error:
            shown = hide_password(uri)
            raise PixartError(f"MLflow at {shown}: {str(error).splitlines()[0]}") from error
        if runs:
            tracker = cls(uri, runs[0].info.run_id)
            client.update_run(tracker.run_id, status="RUNNING")
            return tracker
        tags = {_IDENTITY: identity, "mlflow.runName": name, "mlflow.source.name": "pixart"}
        if parent:
            tags["mlflow.parentRunId"] = parent.run_id
        run = client.create_run(where, tags=tags, run_name=name)
        tracker = cls(uri, run.info.run_id)
        for key, value in _flatten(params or {}).items():
            client.log_param(tracker.run_id, key, str(value)[:_MAX_PARAM])
        return tracker

    def log_metrics(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Log values at ``images_seen``, the step of every curve."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(k, float(v), now, images_seen) for k, v in metrics.items()]
        self._client.log_batch(self.run_id, metrics=entities)

    def log_image(self, image: Any, key: str, images_seen: int) -> None:
        """A picture (H, W, 3) uint8 under ``key``, for MLflow's image grid."""
        self._client.log_image(self.run_id, image, key=key, step=images_seen, synchronous=True)

    def log_table(self, table: Table, context: str) -> None:
        """Record a table as this run's dataset, by folder and digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place = json.dumps({"uri": table.folder.uri})
        dataset = Dataset(table.folder.name, table.digest, "local", place)
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(images seen, value) of a metric, in order; a repeated step keeps its last value."""
        points = {m.step: m.value for m in self._client.get_metric_history(self.run_id, metric)}
        return sorted(points.items())

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)


def _flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

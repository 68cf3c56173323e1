"""How many replicas: a pure function of what they have to do. And when one is of no more use."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import repeatable
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingContext
from serving_load import Models, register_models
from test_serve_engine import eventually

from pixart_serve.replica import Replica
from pixart_serve.scaling import (
    BACKLOG,
    FULLNESS,
    WorkPolicy,
    count_replicas,
    load_of,
    replica_options,
)
from pixart_serve.settings import ServeSettings

_LOADS = st.lists(st.floats(0, 50), max_size=12)
_COUNTS = st.integers(1, 20)


@repeatable
@given(_LOADS, _COUNTS)
def test_there_is_room_for_all_work_and_always_somebody(loads: list[float], count: int) -> None:
    assert count_replicas(loads, count) >= max(sum(loads), 1)


@repeatable
@given(_LOADS, _COUNTS)
def test_one_more_or_less_is_taken_only_for_a_reason(loads: list[float], count: int) -> None:
    wanted = count_replicas(loads, count)
    if wanted > count:
        assert sum(loads) > wanted - 1, "one fewer had had room for it"
    if wanted < count:
        assert sum(loads) <= wanted / 2 or wanted == 1 >= 2 * sum(loads), "the others half idle"


@repeatable
@given(_LOADS, _COUNTS)
def test_the_answer_stands_once_it_was_followed(loads: list[float], count: int) -> None:
    wanted = count_replicas(loads, count)
    assert count_replicas(loads, wanted) == wanted


@repeatable
@given(_LOADS, _COUNTS, st.floats(1, 1.9))
def test_work_that_wavers_moves_nobody(loads: list[float], count: int, more: float) -> None:
    """Who was let go is not wanted again for less than twice the work."""
    wanted = count_replicas(loads, count)
    if wanted < count:
        assert count_replicas([load * more for load in loads], wanted) == wanted


@repeatable
@given(_LOADS, _LOADS, _COUNTS)
def test_more_work_never_wants_fewer(loads: list[float], more: list[float], count: int) -> None:
    assert count_replicas(loads + more, count) >= count_replicas(loads, count)


def test_a_full_queue_is_more_than_may_wait_however_short_it_takes() -> None:
    assert count_replicas([load_of(0.1, 1.0, 10)], 1) == 2
    assert count_replicas([load_of(25, 0.1, 10)], 1) == 3
    assert count_replicas([load_of(4, 0.2, 10)], 1) == 1


def context(target: int, running: int, **reported: dict[str, list[float]]) -> AutoscalingContext:
    """What Serve tells a policy; ``reported`` are values by replica, the newest last."""
    deployment = DeploymentID("drawing", "pixart")
    names = [ReplicaID(name, deployment) for name in "abc"]
    raw = {
        name: {
            ReplicaID(replica, deployment): [
                TimeStampedValue(float(i), value) for i, value in enumerate(values)
            ]
            for replica, values in by_replica.items()
        }
        for name, by_replica in reported.items()
    }
    return AutoscalingContext(
        deployment, "drawing", "pixart", running, target, names[:running], 0.0, 0.0, None, raw,
        1, 10, {}, None, None, None, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "running", "backlogs", "wanted"),
    [
        (1, 1, {}, 1),  # nobody has said anything
        (3, 3, {}, 3),
        (1, 1, {"a": [0, 90, 15]}, 2),  # the newest counts
        (1, 1, {"a": [90, 0]}, 1),
        (1, 1, {"a": []}, 1),
        (2, 2, {"a": [15], "b": [16]}, 4),
        (2, 2, {"a": [1], "b": [2]}, 1),
        (2, 2, {"a": [4], "b": [2]}, 2),  # one would have room, but not be half idle
        (2, 2, {"a": [1]}, 2),  # the other may have much to do
        (2, 1, {"a": [15]}, 2),  # the second is being started
    ],
)
def test_the_policy_reads_what_replicas_report(
    target: int, running: int, backlogs: dict[str, list[float]], wanted: int
) -> None:
    told = context(target, running, **{BACKLOG: backlogs})
    assert WorkPolicy(target_wait_seconds=10)(told) == (wanted, {})


def test_the_policy_hears_of_full_queues() -> None:
    told = context(1, 1, **{BACKLOG: {"a": [1.0]}, FULLNESS: {"a": [0.2, 1.0]}})
    assert WorkPolicy(target_wait_seconds=10)(told) == (2, {})


def test_the_deployment_scales_only_if_it_may() -> None:
    fixed = replica_options(ServeSettings(num_replicas=2))
    assert fixed["num_replicas"] == 2
    assert "autoscaling_config" not in fixed
    settings = ServeSettings(
        num_replicas=2, max_replicas=5, target_wait_seconds=7, upscale_delay_seconds=3,
        downscale_delay_seconds=9, max_wait_seconds=120,
    )  # fmt: skip
    scaled = replica_options(settings)
    assert "num_replicas" not in scaled
    assert scaled["graceful_shutdown_timeout_s"] == 120, "all that was accepted can be drawn"
    config = scaled["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (3, 9)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)  # as the controller does
    assert policy(context(1, 1, **{BACKLOG: {"a": [8.0]}})) == (2, {})


def test_fewer_replicas_at_most_than_always_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_replicas = 2 is less than num_replicas = 3"):
        ServeSettings(num_replicas=3, max_replicas=2)


# --- health ----------------------------------------------------------------------------------

BODY = {"prompt": "a red three", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One registered version; MLflow takes seconds, so all tests share it."""
    return register_models(tmp_path_factory.mktemp("registry"), 1)


def make_replica(models: Models, **settings: Any) -> tuple[Replica, TestClient]:
    """As Serve does it, without Ray."""
    given = ServeSettings(max_rows=4, max_queued=8, poll_seconds=0.05, **settings)
    replica = Replica(given, models.uri, "digits", 2, 2.5)
    return replica, TestClient(replica.__serve_build_asgi_app__())


def draw(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/images/generations", json=BODY | fields)


def test_a_registry_that_does_not_answer_makes_nobody_unhealthy(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    replica, client = make_replica(models)

    def rename(table: str, name: str) -> None:
        path = Path(models.uri.removeprefix("sqlite:///"))
        with closing(sqlite3.connect(path, timeout=30)) as database, database:
            database.execute(f"ALTER TABLE {table} RENAME TO {name}")

    rename("registered_models", "hidden")
    try:
        eventually(lambda: "cannot follow champion" in caplog.text)
        replica.check_health()
        assert draw(client).status_code == 200
        assert replica.record_autoscaling_stats().keys() == {BACKLOG, FULLNESS}
    finally:
        rename("hidden", "registered_models")


def test_a_replica_whose_engine_is_stuck_lets_go_of_its_callers(models: Models) -> None:
    replica, client = make_replica(models, stall_seconds=0.02, max_side=512)
    draw(client)
    replica.check_health()
    answers: list[Any] = []
    stuck = threading.Thread(target=lambda: answers.append(draw(client, size="512x512")))
    stuck.start()

    def is_stuck() -> bool:  # a step of so large a picture takes seconds
        try:
            replica.check_health()
        except RuntimeError:
            return True
        return False

    eventually(is_stuck)
    assert not answers, "it may still come out of it"
    assert is_stuck()
    assert is_stuck()
    stuck.join(20)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "not_ready"
    assert "Retry-After" in answers[0].headers
    with pytest.raises(RuntimeError, match="stuck or dead"):
        replica.check_health()

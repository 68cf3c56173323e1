"""How many replicas: enough that the work at each is done within the seconds that it may wait.

Serve itself counts requests, and one may be four steps or forty pictures of a hundred. Replicas
therefore report their predicted seconds of work, and a full queue as more than may wait, since
what is refused never becomes work. Serve's controller calls the policy and applies the delays.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from pixart_serve.settings import ServeSettings

BACKLOG, FULLNESS = "backlog_seconds", "queue_fullness"  # what a replica reports
_CALM = 0.5  # of the seconds that may wait; less than this, shared by fewer, lets one go
_BUSY = 0.8  # of the queue is as much as may wait
_LOOK_BACK_SECONDS = 15.0  # a replica looks five times in it; only its newest report counts
_SHUTDOWN_SECONDS = 60.0  # for what was accepted; Serve's own 20 s is less than a long queue


def count_replicas(loads: Sequence[float], num_replicas: int) -> int:
    """Replicas wanted for ``loads``, one for each that reported, where 1 is all that may wait.

    As many as have room for all; fewer than ``num_replicas`` only if these would be half idle, or
    one that was just taken away would be wanted again. At least 1.
    """
    total = sum(loads)
    enough = max(math.ceil(total), 1)
    if enough >= num_replicas:
        return enough
    return min(max(math.ceil(total / _CALM), 1), num_replicas)


def load_of(backlog_seconds: float, queue_fullness: float, target_wait_seconds: float) -> float:
    """What a replica has to do, as a share of what may wait there."""
    return max(backlog_seconds / target_wait_seconds, queue_fullness / _BUSY)


class WorkPolicy:
    """What Serve's controller asks, ten times a second, as of Ray 2.60."""

    def __init__(self, target_wait_seconds: float) -> None:
        self._target_wait_seconds = target_wait_seconds

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas wanted now, and no state."""
        backlogs = _newest(context.raw_metrics, BACKLOG)
        fullness = _newest(context.raw_metrics, FULLNESS)
        loads = [
            load_of(backlogs[replica], fullness.get(replica, 0.0), self._target_wait_seconds)
            for replica in backlogs
        ]
        wanted = count_replicas(loads, context.target_num_replicas)
        if len(loads) < len(context.running_replicas):  # some have not said yet what they have
            wanted = max(wanted, context.target_num_replicas)
        return wanted, {}


def _newest(reported: Mapping[str, Mapping[Any, Any]] | None, name: str) -> dict[Any, float]:
    """The last value by replica."""
    series = (reported or {}).get(name, {})
    return {replica: points[-1].value for replica, points in series.items() if points}


def shutdown_seconds(settings: ServeSettings) -> float:
    """How long a replica may take to draw what it accepted, once it is to leave."""
    if settings.max_replicas <= settings.num_replicas:
        return _SHUTDOWN_SECONDS
    # Nobody waits for one that leaves while others stay: all that it accepted may be drawn.
    return max(_SHUTDOWN_SECONDS, settings.max_wait_seconds)


def replica_options(settings: ServeSettings) -> dict[str, Any]:
    """What Serve is to know about how many there are, and how long one may take to leave."""
    leaving = {"graceful_shutdown_timeout_s": shutdown_seconds(settings)}
    if settings.max_replicas <= settings.num_replicas:
        return {"num_replicas": settings.num_replicas, **leaving}
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]  # Ray has types in parts
        policy_function=WorkPolicy,
        policy_kwargs={"target_wait_seconds": settings.target_wait_seconds},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.num_replicas,
            max_replicas=settings.max_replicas,
            upscale_delay_s=settings.upscale_delay_seconds,
            downscale_delay_s=settings.downscale_delay_seconds,
            look_back_period_s=_LOOK_BACK_SECONDS,
            policy=policy,
        ),
        **leaving,
    }

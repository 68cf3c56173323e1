"""One replica: an engine on a thread, a follower beside it, and the API in front.

Serve sees HTTP requests and decides who gets them; it never sees a step. Its limits are set above
the engine's, so that it is the engine that refuses, in OpenAI's words.
"""

import sys
from pathlib import Path

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from pixart_platform.registry import Registry
from pixart_serve.access import open_log
from pixart_serve.api import build_api
from pixart_serve.engine import DrawingEngine
from pixart_serve.follower import Follower
from pixart_serve.keys import ApiKeys, require_keys
from pixart_serve.metrics import ReplicaMetrics
from pixart_serve.scaling import BACKLOG, FULLNESS, replica_options
from pixart_serve.service import EngineService
from pixart_serve.settings import ServeSettings
from pixart_serve.usage import Accounts

_BURST_REQUESTS = 256  # being refused, asking for health or models; more than this Serve refuses
_RETRY_AFTER_SECONDS = 5.0
# A step is a thousand short calls into torch, each of which lets go of the interpreter and wants it
# back from the other threads: at Python's 5 ms a saturated replica took 296 row-steps a second, not
# 344. (At 0.02 ms, 295: then it is the switching.)
_SWITCH_SECONDS = 0.0002
_MAX_FAILED_CHECKS = 3  # in a row, after which Serve replaces a replica


class Replica:
    """Constructed by Serve; ready once a version is live. Raises what is wrong, a PixartError."""

    def __init__(
        self,
        settings: ServeSettings,
        registry_uri: str,
        model_name: str,
        default_steps: int,
        default_guidance: float,
        default_guidance_rescale: float = 0.0,
    ) -> None:
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._settings = settings
        self._steps, self._guidance = default_steps, default_guidance
        self._rescale = default_guidance_rescale
        self._num_failed_checks = 0
        self._metrics = ReplicaMetrics()
        open_log()
        self._engine = DrawingEngine(
            max_rows=settings.max_rows,
            max_queued=settings.max_queued,
            stall_seconds=settings.stall_seconds,
            observer=self._metrics,
        )
        self._keys = ApiKeys(Path(settings.api_keys_file)) if settings.api_keys_file else None
        self._follower = Follower(
            Registry(registry_uri, model_name),
            settings.alias,
            self._engine,
            device="cuda" if settings.num_gpus and torch.cuda.is_available() else "cpu",
            poll_seconds=settings.poll_seconds,
            max_versions=settings.max_versions,
            challenger=settings.challenger,
            challenger_share=settings.challenger_share,
        )
        self._service = EngineService(self._engine, model_name, settings.alias, self._follower)
        self._follower.load_first()
        self._follower.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the application after construction: it needs this very engine."""
        accounts = Accounts(self._settings.key_units_per_minute, observer=self._metrics)
        api = build_api(
            self._service,
            self._settings,
            default_steps=self._steps,
            default_guidance=self._guidance,
            default_guidance_rescale=self._rescale,
            behind_serve=True,
            observer=self._metrics,
            accounts=accounts,
            knows_key=self._keys.knows if self._keys else None,
        )
        if self._keys:
            require_keys(api, self._keys, accounts)
        return api

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._engine.is_healthy():
            self._num_failed_checks += 1
            if self._num_failed_checks >= _MAX_FAILED_CHECKS:
                self._engine.give_up()  # or Serve would wait for those who wait for it
            raise RuntimeError("the drawing engine is stuck or dead")
        self._num_failed_checks = 0
        self._metrics.expect(self._engine.backlog_seconds())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands on to the policy."""
        return {
            BACKLOG: self._engine.backlog_seconds(), FULLNESS: self._engine.queue_fullness(),
        }  # fmt: skip

    def __del__(self) -> None:
        """Serve calls this once what was accepted has been answered."""
        for name in ("_follower", "_engine"):
            if hasattr(self, name):
                getattr(self, name).close()


def build_application(
    settings: ServeSettings,
    registry_uri: str,
    model_name: str,
    default_steps: int,
    default_guidance: float,
    default_guidance_rescale: float,
) -> Application:
    """The deployment, bound to what its replicas are constructed with."""
    deploy = serve.deployment(
        name="drawing",
        **replica_options(settings),
        # One CPU: Ray gives torch as many threads as an actor has CPUs.
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.num_gpus},
        max_ongoing_requests=settings.max_rows + settings.max_queued + _BURST_REQUESTS,
        max_queued_requests=_BURST_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER_SECONDS),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        max_constructor_retry_count=1,
    )
    deployment = deploy(serve.ingress()(Replica))
    bound: Application = deployment.bind(
        settings, registry_uri, model_name, default_steps, default_guidance,
        default_guidance_rescale,
    )  # fmt: skip
    return bound

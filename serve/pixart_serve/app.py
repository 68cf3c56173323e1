"""Starting and stopping the drawing service on a Ray that is already there.

What a user can get wrong is found out here, before any replica exists: a port that is taken, an
alias nobody set. What goes wrong in a replica comes back as one line too.
"""

import errno
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from pixart_platform.errors import PixartError
from pixart_platform.registry import Registry
from pixart_platform.storage import open_folder
from pixart_serve.keys import ApiKeys
from pixart_serve.replica import build_application
from pixart_serve.settings import ServeSettings

APPLICATION = "pixart"
BUILDER = "pixart_serve.app:deploy"
_ANSWER_SECONDS = 30.0


class ServiceError(PixartError):
    """A drawing service that could not be started."""


class Deployed(BaseModel):
    """What a Serve config says of the service; see the recipe for what its settings mean."""

    model_config = ConfigDict(extra="forbid")
    settings: ServeSettings
    model_name: str
    default_steps: int
    default_guidance: float
    default_guidance_rescale: float = 0.0
    registry_uri: str = ""
    """Where MLflow is; without it ``MLFLOW_TRACKING_URI`` says: no password is in a file."""


def deploy(arguments: Deployed) -> Application:
    """The application as a Serve config names it: ``import_path: pixart_serve.app:deploy``.

    Raises ServiceError if nobody says where the registry is.
    """
    registry_uri = arguments.registry_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not registry_uri:
        raise ServiceError("where is the registry? Set MLFLOW_TRACKING_URI, or args.registry_uri")
    return build_application(
        arguments.settings, registry_uri, arguments.model_name, arguments.default_steps,
        arguments.default_guidance, arguments.default_guidance_rescale,
    )  # fmt: skip


def start(
    settings: ServeSettings,
    *,
    registry_uri: str,
    model_name: str,
    default_steps: int,
    default_guidance: float,
    default_guidance_rescale: float = 0.0,
    jobs: Path | None = None,
) -> str:
    """Serve what the alias names and return the base URL once it answers.

    Ray must be initialised. ``jobs`` is where drawing jobs are kept if the settings name no place.
    Raises RegistryError for an unknown alias, KeysError for a file of keys that cannot be used,
    StorageError for a place of jobs that cannot be written, ServiceError for a busy port or a
    version that no replica can load; nothing is left running then.
    """
    check_port(settings)
    if settings.api_keys_file:
        ApiKeys(Path(settings.api_keys_file))
    Registry(registry_uri, model_name).get(settings.alias)
    if settings.jobs or jobs:
        place = open_folder(settings.jobs or str(jobs))
        place.write("probe", b"")
        place.delete("probe")
        settings = settings.model_copy(update={"jobs": place.uri})  # replicas start elsewhere
    application = deploy(
        Deployed(
            settings=settings, model_name=model_name, default_steps=default_steps,
            default_guidance=default_guidance,
            default_guidance_rescale=default_guidance_rescale, registry_uri=registry_uri,
        )
    )  # fmt: skip
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(
            http_options={"host": settings.host, "port": settings.port}, logging_config=quiet
        )
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        url = f"http://{host}:{settings.port}"
        _wait_for_answer(url)
    except (RuntimeError, TimeoutError) as error:
        reason = _find_reason() or str(error).splitlines()[0]
        stop()
        raise ServiceError(f"the drawing service did not start: {reason}") from error
    except BaseException:  # Ctrl-C too: nothing half started stays
        stop()
        raise
    return url


def stop() -> None:
    """Finish what was accepted (for a minute at most), then stop; Ray stays up, and what others
    serve there."""
    if APPLICATION in serve.status().applications:
        with suppress(TimeoutError):  # a shutdown alone would cut pictures short
            serve.delete(APPLICATION)
    if not set(serve.status().applications) - {APPLICATION}:
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray has types in parts


def check_port(settings: ServeSettings) -> None:
    """Raise ServiceError unless the settings' port can be listened on."""
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceError(
                    f"port {port} on {host} is taken by another program; stop it, or choose "
                    f"another port with --set serve.port={port + 1 if port < 65535 else 8000}"
                ) from error
            raise ServiceError(
                f"cannot listen on {host}:{port} ({error.strerror}); change it with "
                f"--set serve.host=... or --set serve.port=..."
            ) from error


def _wait_for_answer(url: str) -> None:
    """Until /healthz answers through the proxy. Raises TimeoutError."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise TimeoutError(f"{url}/healthz did not answer within {_ANSWER_SECONDS:.0f} s")


def _find_reason() -> str:
    """The named error that a replica's traceback ends with, if one did."""
    application = serve.status().applications.get(APPLICATION)
    deployments = application.deployments.values() if application else []
    lines = "\n".join(deployment.message for deployment in deployments).splitlines()
    named = [line.strip() for line in lines if line.strip().startswith("pixart_")]
    return named[-1].partition(": ")[2] if named else ""

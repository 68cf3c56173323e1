"""What the service refuses before it starts anything: no Ray is needed to be told."""

import socket
from pathlib import Path

import pytest

from pixart_platform.errors import RegistryError
from pixart_platform.tracking import Tracker, sqlite_uri
from pixart_serve.app import ServiceError, start
from pixart_serve.settings import ServeSettings


def start_on(settings: ServeSettings, uri: str) -> str:
    return start(
        settings, registry_uri=uri, model_name="digits", default_steps=4, default_guidance=2.5
    )


def test_a_busy_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} on 127.0.0.1.*--set serve.port="):
            start_on(ServeSettings(port=port), sqlite_uri(tmp_path))
    assert not list(tmp_path.iterdir()), "nothing was touched"


def test_an_address_of_another_machine_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"cannot listen on 192\.0\.2\.77:8123.*serve\.host"):
        start_on(ServeSettings(host="192.0.2.77", port=8123), sqlite_uri(tmp_path))


def test_an_unknown_alias_is_named(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    Tracker.start(uri, "serve", "tests", "tests", artifacts=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(RegistryError, match=r"'champion'.*nothing registered yet"):
        start_on(ServeSettings(port=port), uri)

"""What the service refuses before it starts anything: no Ray is needed to be told."""

import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pixart_platform.errors import RegistryError
from pixart_platform.tracking import Tracker, sqlite_uri
from pixart_serve.app import ServiceError, start
from pixart_serve.keys import KeysError
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
        start_on(
            ServeSettings(host="192.0.2.77", port=8123, allow_anonymous=True), sqlite_uri(tmp_path)
        )


def test_an_unknown_alias_is_named(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    Tracker.start(uri, "serve", "tests", "tests", artifacts=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(RegistryError, match=r"'champion'.*nothing registered yet"):
        start_on(ServeSettings(port=port), uri)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.77", "drawing.example"])
def test_other_machines_need_keys_or_a_word_that_they_need_none(host: str) -> None:
    with pytest.raises(ValidationError, match=rf"host = '{host}'.*api_keys_file.*allow_anonymous"):
        ServeSettings(host=host)
    assert ServeSettings(host=host, allow_anonymous=True).host == host
    assert ServeSettings(host=host, api_keys_file="keys").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_keys(host: str) -> None:
    assert ServeSettings(host=host).host == host


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"key_units_per_minute": 5}, "limits keys, and there are none"),
        ({"challenger_share": 0.5}, "set challenger to an alias"),
        ({"challenger": "next", "max_versions": 3}, "max_versions = 3"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(fields: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ServeSettings(**fields)


def test_a_missing_file_of_keys_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    settings = ServeSettings(port=port, api_keys_file=str(tmp_path / "keys"))
    with pytest.raises(KeysError, match=rf"api_keys_file = {tmp_path}/keys: No such file"):
        start_on(settings, sqlite_uri(tmp_path))
    assert not list(tmp_path.iterdir()), "nothing was touched"

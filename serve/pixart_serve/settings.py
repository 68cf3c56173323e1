"""What a recipe says about serving."""

import ipaddress
from typing import Self

from pydantic import Field, model_validator

from pixart_platform.recipe import Section


class ServeSettings(Section):
    """The drawing service."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    alias: str = "champion"
    """The registry alias (or version number) replicas follow."""
    challenger: str = ""
    """The alias (or version number) of a second version, tried on a share of the requests."""
    challenger_share: float = Field(0.0, ge=0, le=1)
    """Of the requests that name no version, as their seeds decide; 0.05 is one in twenty."""
    max_versions: int = Field(4, ge=3, le=1000)
    """Versions in a replica's memory: live, the one before, the challenger, those asked for."""
    num_replicas: int = Field(1, ge=1, le=1000)
    max_rows: int = Field(32, ge=2, le=4096)
    """Rows in one denoising batch; a guided picture takes two."""
    max_queued: int = Field(64, ge=1, le=100_000)
    """Requests that may wait at one replica before new ones are refused."""
    max_wait_seconds: float = Field(600.0, gt=0, le=86_400)
    """What a request may take, unless it allows less; one that would take longer is refused."""
    heartbeat_seconds: float = Field(15.0, gt=0, le=3600)
    """A stream that is silent for so long says that it lives, or proxies would close it."""
    poll_seconds: float = Field(2.0, gt=0, le=3600)
    """How often a replica looks whether the alias has moved."""
    max_side: int = Field(96, ge=8, le=8192)
    """Longest side of a picture in pixels."""
    max_steps: int = Field(100, ge=1, le=1000)
    max_prompt_bytes: int = Field(4000, ge=1, le=100_000)
    api_keys_file: str = ""
    """A line ``NAME:SALT:HASH`` for each API key; without a file nobody is asked for one."""
    key_units_per_minute: int = Field(0, ge=0)
    """What one key may spend at one replica, in rows x steps x image tokens; 0 is no limit."""
    allow_anonymous: bool = False
    """Whether other machines may ask without a key."""
    num_gpus: float = Field(0, ge=0, le=8)
    """GPUs (or a share of one) for each replica; 0 draws on the CPU."""
    stall_seconds: float = Field(60.0, gt=0, le=3600)
    """A denoising step that takes longer makes its replica unhealthy, and Serve replaces it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.api_keys_file or self.allow_anonymous or _is_loopback(self.host)):
            raise ValueError(
                f"host = {self.host!r} lets other machines ask, and no key is wanted of them; set "
                f"api_keys_file, or allow_anonymous = true if they all may"
            )
        if self.key_units_per_minute and not self.api_keys_file:
            raise ValueError(
                f"key_units_per_minute = {self.key_units_per_minute} limits keys, and there are "
                f"none; set api_keys_file"
            )
        if self.challenger_share and not self.challenger:
            raise ValueError(
                f"challenger_share = {self.challenger_share} and nobody to draw it; set challenger "
                f"to an alias"
            )
        if self.challenger and self.max_versions < 4:
            raise ValueError(
                f"max_versions = {self.max_versions}: the live version, the one before, the "
                f"challenger and one to be loaded are 4"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

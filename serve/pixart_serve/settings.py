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
    """Always there; there may be more, see max_replicas."""
    max_replicas: int = Field(0, ge=0, le=1000)
    """While more work waits than may, there are up to so many; 0: never more than num_replicas."""
    target_wait_seconds: float = Field(10.0, gt=0, le=3600)
    """Predicted work that may wait at each replica before another is started."""
    upscale_delay_seconds: float = Field(10.0, ge=0, le=3600)
    """How long there must be too much work, and Serve learns of it every 10 s only."""
    downscale_delay_seconds: float = Field(300.0, ge=0, le=86_400)
    """How long fewer replicas must have been enough before one is let go."""
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
    prompt_filter: str = ""
    """``module:function`` of (prompt, negative_prompt): None lets pass, a string says why not."""
    picture_filter: str = ""
    """``module:function`` of a picture (H, W, 3) uint8, the same; with it nobody sees previews."""
    log_prompts: bool = False
    """Whether the access log repeats what people asked for."""
    jobs: str = ""
    """The folder or ``s3://`` place of drawing jobs, which all replicas must see; it keeps prompts
    and pictures. ``pixart serve`` takes ``jobs`` in the run's folder if none is set."""
    max_job_pictures: int = Field(1000, ge=1, le=100_000)
    """Of one job."""
    max_job_units: int = Field(0, ge=0)
    """What one job may cost, in rows x steps x image tokens; 0 is no limit."""
    max_jobs: int = Field(100, ge=1, le=10_000)
    """Jobs of one key (or of all who come without) that are kept; then some must be deleted."""
    job_keep_seconds: float = Field(86_400, gt=0, le=31_536_000)
    """How long a job may take, and how long its pictures are kept after it ended."""
    job_lease_seconds: float = Field(30.0, gt=0, le=3600)
    """A replica silent for so long loses its part of a job to another."""
    num_gpus: float = Field(0, ge=0, le=8)
    """GPUs (or a share of one) for each replica; 0 draws on the CPU."""
    stall_seconds: float = Field(60.0, gt=0, le=3600)
    """A denoising step that takes longer makes its replica unhealthy, and Serve replaces it."""

    @property
    def max_body_bytes(self) -> int:
        """Two prompts, each byte at worst a JSON escape of six, and room for the rest."""
        return 12 * self.max_prompt_bytes + 16_384

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
        if self.max_replicas and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas = {self.max_replicas} is less than num_replicas = "
                f"{self.num_replicas}; raise it, or leave it out for no more than these"
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

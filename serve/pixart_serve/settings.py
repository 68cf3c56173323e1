"""What a recipe says about serving."""

from pydantic import Field

from pixart_platform.recipe import Section


class ServeSettings(Section):
    """The drawing service."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    alias: str = "champion"
    """The registry alias (or version number) replicas follow."""
    num_replicas: int = Field(1, ge=1, le=1000)
    max_rows: int = Field(32, ge=2, le=4096)
    """Rows in one denoising batch; a guided picture takes two."""
    max_queued: int = Field(64, ge=1, le=100_000)
    """Requests that may wait at one replica before new ones are refused."""
    poll_seconds: float = Field(2.0, gt=0, le=3600)
    """How often a replica looks whether the alias has moved."""
    max_side: int = Field(96, ge=8, le=8192)
    """Longest side of a picture in pixels."""
    max_steps: int = Field(100, ge=1, le=1000)
    max_prompt_bytes: int = Field(4000, ge=1, le=100_000)
    num_gpus: float = Field(0, ge=0, le=8)
    """GPUs (or a share of one) for each replica; 0 draws on the CPU."""
    stall_seconds: float = Field(60.0, gt=0, le=3600)
    """A denoising step that takes longer makes its replica unhealthy, and Serve replaces it."""

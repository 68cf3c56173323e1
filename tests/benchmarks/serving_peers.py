"""What one would deploy without this project: diffusers' pipeline on Ray Serve, two ways.

Both read the body of our Images API and answer a PNG. They load the exported weights with diffusers
alone, and draw from the noise of the seed.
"""

import asyncio
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

MAX_BATCH = 16  # requests; two rows each when guided
WAIT_SECONDS = 0.02
_PATIENT: dict[str, Any] = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 1}}


class Pipeline:
    """diffusers' pipeline, as its documentation uses it."""

    def __init__(self, folder: str, told: dict[str, Any]) -> None:
        """``told`` are the arguments that every call of the exported pipeline needs."""
        from diffusers import PixArtAlphaPipeline

        self._pipeline: Any = PixArtAlphaPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
        self._pipeline.set_progress_bar_config(disable=True)
        self._told = told

    def draw(self, asked: Sequence[dict[str, Any]]) -> list[bytes]:
        """One call; all have the same steps and scale. PNG files."""
        first = asked[0]
        pictures = self._pipeline(
            [one["prompt"] for one in asked],
            num_inference_steps=first["num_inference_steps"],
            guidance_scale=first["guidance_scale"],
            generator=[torch.Generator().manual_seed(one["seed"]) for one in asked],
            **self._told,
        ).images  # fmt: skip
        return [_to_png(picture) for picture in pictures]


def _to_png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


@serve.deployment(name="plain", **_PATIENT)
class Plain:
    """A request, a call."""

    def __init__(self, folder: str, told: dict[str, Any]) -> None:
        self._pipeline, self._turn = Pipeline(folder, told), asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        asked = await request.json()
        async with self._turn:
            (picture,) = await asyncio.to_thread(self._pipeline.draw, [asked])
        return Response(picture, media_type="image/png")


@serve.deployment(name="batched", **_PATIENT)
class Batched:
    """Requests that come together, a call for those of the same steps and scale."""

    def __init__(self, folder: str, told: dict[str, Any]) -> None:
        self._pipeline = Pipeline(folder, told)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_SECONDS)
    async def draw(self, asked: list[dict[str, Any]]) -> list[bytes]:
        alike = defaultdict(list)
        for i, one in enumerate(asked):
            alike[one["num_inference_steps"], one["guidance_scale"]].append(i)
        pictures = [b""] * len(asked)
        for numbers in alike.values():
            some = [asked[i] for i in numbers]
            drawn = await asyncio.to_thread(self._pipeline.draw, some)
            for i, picture in zip(numbers, drawn, strict=True):
                pictures[i] = picture
        return pictures

    async def __call__(self, request: Request) -> Response:
        return Response(await self.draw(await request.json()), media_type="image/png")

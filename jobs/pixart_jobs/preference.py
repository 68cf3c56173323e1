"""Preference: which of two versions people like better, voted blind, as in the paper's user study.

A poll shows every voter the same pairs: one prompt, drawn by both versions with the same noise.
Which side a version is on is a function of (seed, prompt, voter), in balance for each voter. What
was drawn is kept by digest in the run's folder, so that a poll that is opened again is there at
once, and a version's pictures serve all its polls.
"""

import fcntl
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from pixart_jobs.recipe import DrawSettings, Recipe
from pixart_jobs.suites import held_out_prompts
from pixart_models.digits import describe
from pixart_models.drawing import Drawer, load_drawer
from pixart_platform.errors import ManifestError, PixartError, StorageError
from pixart_platform.manifest import FileRecord, Manifest, verify_folder
from pixart_platform.recipe import digest_of
from pixart_platform.registry import DIGEST_TAG, Version
from pixart_platform.seeds import derive_seed
from pixart_platform.storage import publish_folder


class PreferenceError(PixartError):
    """A poll that cannot be held, or a vote that cannot be counted; ``status`` is HTTP's word."""

    status = 400


@dataclass(frozen=True)
class Poll:
    """Two versions, what both draw, and where that and the votes are kept."""

    a: Version
    b: Version
    prompts: tuple[str, ...]
    draw: DrawSettings
    seed: int
    root: Path

    def __post_init__(self) -> None:
        if self.a.tags.get(DIGEST_TAG) == self.b.tags.get(DIGEST_TAG):
            raise PreferenceError(
                f"{label(self.a)} and {label(self.b)} hold the same weights: nobody could tell "
                f"their pictures apart; name two that differ"
            )

    @cached_property
    def digest(self) -> str:
        """Names the poll by everything that decides what voters see."""
        sides = {label(v): self.drawing_of(v) for v in (self.a, self.b)}
        return digest_of({"poll": 1, "sides": list(sides.items())})

    @cached_property
    def pairs(self) -> dict[str, int]:
        """Place by id; an id says nothing and is of this poll alone."""
        return {digest_of({"poll": self.digest, "pair": i}): i for i, _ in enumerate(self.prompts)}

    @property
    def folder(self) -> Path:
        return self.root / "votes" / self.digest

    def drawing_of(self, version: Version) -> dict[str, object]:
        """What decides a version's pictures."""
        return {
            "snapshot": version.tags.get(DIGEST_TAG, ""), "prompts": self.prompts,
            "draw": self.draw.model_dump(mode="json"), "seed": self.seed,
        }  # fmt: skip

    def order_for(self, voter: str) -> dict[str, bool]:
        """The pairs as a voter meets them, and whether a is on the left: in half of them."""

        def shuffled(what: str) -> list[str]:
            draw = {
                pair: derive_seed(self.seed, what, i, self.prompts[i], voter)
                for pair, i in self.pairs.items()
            }
            return sorted(draw, key=lambda pair: draw[pair])

        odd = derive_seed(self.seed, "odd", voter) % 2
        left = set(shuffled("side")[: (len(self.prompts) + odd) // 2])
        return {pair: pair in left for pair in shuffled("order")}


def label(version: Version) -> str:
    return f"{version.name}@{version.number}"


def choose_prompts(recipe: Recipe, file: Path | None, num: int) -> tuple[str, ...]:
    """The first ``num`` different prompts of a file, one a line, or of those held out.

    Raises PreferenceError for a file without any, or a recipe that holds none out.
    """
    if file is None:
        if recipe.data.source != "digits":
            raise PreferenceError(
                f"recipe {recipe.name}: data.source = {recipe.data.source} holds no prompts out; "
                f"name a file of prompts with --prompts FILE"
            )
        lines = [describe(reading) for reading in held_out_prompts(4 * num, recipe.evaluate.seed)]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PreferenceError(
                f"--prompts {file}: cannot be read ({getattr(error, 'strerror', 'not UTF-8')}); "
                f"give a text file with one prompt a line"
            ) from error
    prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))[:num]
    if not prompts:
        raise PreferenceError(f"--prompts {file}: holds no prompt; write one a line")
    return prompts


def draw(
    poll: Poll, batch: int, on_progress: Callable[[int], None]
) -> tuple[list[bytes], list[bytes]]:
    """The pictures of a and of b as PNG, all of one size; what was drawn before is read.

    The size is the larger version's, so that it does not tell them apart. Raises RegistryError
    and ModelInputError for what cannot be drawn.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, drawer = [], None
    with locked(poll.root / "votes" / ".lock"):
        for k, version in enumerate((poll.a, poll.b)):
            asked = poll.drawing_of(version)
            folder = poll.root / "votes" / f"pictures-{digest_of(asked)}"
            if not _is_whole(folder):
                drawer = load_drawer(version.fetch(), device, like=drawer)
                _draw_into(folder, asked, drawer, poll, batch, k, on_progress)
            on_progress((k + 1) * len(poll.prompts))
            found.append(folder)
        with Image.open(found[0] / _name(0)) as a, Image.open(found[1] / _name(0)) as b:
            size = max(a.size, b.size)
        first, second = ([_encode(f / _name(i), size) for i in poll.pairs.values()] for f in found)
    return first, second


def _draw_into(
    folder: Path, asked: dict[str, object], drawer: Drawer, poll: Poll, batch: int, turn: int,
    on_progress: Callable[[int], None],
) -> None:  # fmt: skip
    staging, count = folder.with_name(f".{folder.name}"), len(poll.prompts)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for start in range(0, count, batch):
        places = range(start, min(start + batch, count))
        pictures = drawer.draw(
            [poll.prompts[i] for i in places],
            [derive_seed(poll.seed, "vote", i) for i in places],
            steps=poll.draw.num_steps, guidance=poll.draw.guidance,
            guidance_rescale=poll.draw.guidance_rescale,
        )  # fmt: skip
        for i, picture in zip(places, pictures, strict=True):
            Image.fromarray(picture).save(staging / _name(i))
        on_progress(turn * count + places.stop)
    records = tuple(FileRecord.of(path) for path in sorted(staging.iterdir()))
    Manifest("vote-pictures/1", asked, {}, records).commit_to(staging)
    publish_folder(staging, folder)


def _is_whole(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except ManifestError:
        return False
    return True


def _name(place: int) -> str:
    return f"{place:05d}.png"


def _encode(path: Path, size: tuple[int, int]) -> bytes:
    """PNG of pixels alone: one way for both versions, whatever the file holds."""
    with Image.open(path) as picture:
        pixels = picture.convert("RGB")
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    pixels.save(encoded, format="png")
    return encoded.getvalue()


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """A file to append to, made if need be, that no other process or thread has now.

    Raises StorageError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file

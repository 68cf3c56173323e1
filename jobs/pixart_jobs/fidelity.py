"""Fidelity: how near drawn pictures come to real ones, by a protocol that does not move.

1. Rows: ``num_references`` rows of the reference table whose captions are ok, chosen by
   ``evaluate.seed`` without repetition. Their first captions are drawn, a picture each.
2. References: the pictures of the same rows, decoded and fitted to the drawn pictures' square as
   encoding does: scaled to cover it (bicubic, antialiased), centre-cropped.
3. Both sides are 8-bit RGB when the extractor sees them; drawn ones have been PNG in between.
4. FID and KID are torchmetrics' on features in fp64, KID's over 100 subsets of 1,000 (one of all
   where there are no more); precision and recall are Kynkaanniemi's (2019, arXiv 1904.06991) with
   k = 3; the CLIP score is the mean of 100 times the cosine.

Figures compare only where basis, and with it rows, count, size and extractor, is the same. Their
intervals are over pictures, at ``CONFIDENCE``: FID's and KID's from resamples of both sides, moved
to the figure (repetition alone raises FID); precision's and recall's with the other side held fast.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray

from pixart_jobs import caption, ingest, selection
from pixart_jobs.certainty import measure
from pixart_jobs.distances import covered, measure_fid, measure_kid
from pixart_jobs.encode import fit
from pixart_jobs.pictures import PictureError, read_pictures
from pixart_jobs.recipe import Recipe
from pixart_jobs.sheet import gather_tables
from pixart_jobs.sources import open_source
from pixart_jobs.suites import (
    Judge,
    Measured,
    Outcomes,
    Picture,
    Row,
    Seen,
    Workers,
    encode_png,
    figures_of,
    judge_pictures,
    read_rows,
)
from pixart_models.buckets import Size
from pixart_models.extractors import (
    CLIP,
    PCA,
    SPEC,
    ClipScorer,
    PcaExtractor,
    extractor_revision,
    load_extractor,
)
from pixart_models.text import ModelNotFound
from pixart_platform.errors import PixartError
from pixart_platform.partitions import Progress
from pixart_platform.recipe import digest_of
from pixart_platform.storage import Folder, LocalFolder, open_folder
from pixart_platform.tables import OK, ROW_GROUP_ROWS, Table, TableWriter, open_cached

_FITTED_ON = 2048  # references that the builtin extractor is fitted on, at most

Place = tuple[int, int]
"""A row of a table: its partition, and its place there."""


class FidelityError(PixartError):
    """Fidelity that cannot be measured as asked."""


@dataclass(frozen=True)
class FidelitySuite:
    """Drawn captions of a reference table against its pictures."""

    images: str
    """The image table, by URI: manifests are too large to send."""
    digest: str
    places: tuple[Place, ...]
    prompts: Sequence[str]
    side: int
    extractor: str
    extractor_revision: str
    clip: str
    clip_revision: str
    batch_images: int
    fitted: Path | None
    """Where the builtin extractor is kept."""
    name = "fidelity"
    revision = 1
    copies = 1

    @classmethod
    def open(
        cls, recipe: Recipe, side: int, tables: Mapping[str, Table], root: Path
    ) -> "FidelitySuite":
        """Of ``images`` and ``captions``. Raises FidelityError, ModelNotFound."""
        asked = recipe.evaluate
        images, captions = tables["images"], tables["captions"]
        places, prompts = choose_rows(captions, asked.num_references, asked.seed)
        revision = extractor_revision(asked.extractor)
        made_from = {"images": images.digest, "places": places, "side": side, "fit": 1}
        fitted = root / f"extractor-{digest_of(made_from)[:8]}.safetensors"
        return cls(
            images.folder.uri, images.digest, places, prompts, side, asked.extractor, revision,
            asked.clip, extractor_revision(asked.clip, CLIP) if asked.clip else "",
            asked.batch_images, fitted if asked.extractor == PCA else None,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        clip = {"clip": [self.clip, self.clip_revision]} if self.clip else {}
        return {
            "extractor": [self.extractor, self.extractor_revision], "reference": self.digest,
            "references": digest_of({"places": self.places}), "side": self.side,
            "num_references": len(self.places),
        } | clip  # fmt: skip

    @property
    def num_references(self) -> int:
        return len(self.places)

    def _writer(self, root: Folder) -> TableWriter:
        asked = {k: v for k, v in self.settings.items() if k in ("extractor", "reference", "side")}
        # The builtin extractor is another for other references, so nothing of it is taken over.
        asked["_" * (not self.fitted) + "references"] = self.settings["references"]
        parts = [digest_of({"places": batch}) for batch in self._batches]
        return TableWriter.under(root, "references", "judgements/1", asked, {}, parts)

    @cached_property
    def _batches(self) -> list[tuple[Place, ...]]:
        size = self.batch_images
        return [self.places[i : i + size] for i in range(0, len(self.places), size)]

    def prepare(self, root: Folder, workers: Workers) -> Progress:
        if self.fitted and not self.fitted.is_file():
            places = self.places[:: -(-len(self.places) // _FITTED_ON)]
            fit_there: Any = ray.remote(_fit_extractor)
            data = ray.get(fit_there.remote(self.images, places, self.side))
            LocalFolder(self.fitted.parent).create_once(self.fitted.name, data)
        writer = self._writer(root)
        if not writer.is_committed:
            writer.adopt()
            read_batch = _ReadReferences(self.images, self._batches, tuple(self.prompts), self.side)
            yield from judge_pictures(self, read_batch, writer, workers)
            writer.commit()

    def make_judge(self) -> Judge:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for spec, source, revision in (
            (SPEC, self.extractor, self.extractor_revision), (CLIP, self.clip, self.clip_revision)
        ):  # fmt: skip
            if source and extractor_revision(source, spec) != revision:
                raise ModelNotFound(spec.kind, source, "this machine has another revision of it")
        extractor = load_extractor(self.extractor, device, self.fitted)
        scorer = ClipScorer(self.clip, device) if self.clip else None

        def judge(pictures: Sequence[Picture], prompts: Sequence[str]) -> list[Seen]:
            features = extractor.extract(pictures)
            if not np.isfinite(features).all():
                raise FidelityError(
                    f"evaluate.extractor = {self.extractor!r}: its features are not all finite; "
                    f"give another"
                )
            scores = scorer.score(pictures, prompts) if scorer else [None] * len(pictures)
            return [
                ("" if score is None else json.dumps(score), row.astype("<f4").tobytes())
                for row, score in zip(features, scores, strict=True)
            ]

        return judge

    def measure(self, rows: list[Row], root: Folder) -> Measured:
        real_rows = read_rows(Table.open(self._writer(root).folder))
        drawn, real = _features(rows), _features(real_rows)
        figures = {"fid": measure_fid(drawn, real), "kid": measure_kid(drawn, real)}
        precise = covered(drawn, real)
        figures["recall"] = measure(_as_outcomes(covered(real, drawn)))
        outcomes: Outcomes = {"precision": _as_outcomes(precise).tolist()}
        notes = []
        if len(drawn) <= drawn.shape[1]:
            notes.append(
                f"FID of {len(drawn)} pictures in {drawn.shape[1]} dimensions: covariances are "
                f"singular; more pictures than dimensions tell more"
            )
        if self.clip:
            scores = [[json.loads(row["seen"]), 1.0] for row in rows]
            outcomes["clip_score"] = scores
            own = np.mean([json.loads(row["seen"]) for row in real_rows])
            notes.append(f"the references' own CLIP score is {own:.2f}")
        return Measured(figures | figures_of(outcomes), outcomes, tuple(notes))


def _features(rows: list[Row]) -> NDArray[np.float64]:
    return np.stack([np.frombuffer(row["features"], "<f4") for row in rows]).astype(np.float64)


def _as_outcomes(held: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.column_stack([held, np.ones(len(held))]).astype(np.float64)


def find_tables(recipe: Recipe, store: Folder) -> dict[str, Table]:
    """The reference's ``images`` and ``captions``: what the recipe names, or its own, made earlier.

    Raises FidelityError, ManifestError.
    """
    if recipe.evaluate.reference:
        return gather_tables(open_folder(recipe.evaluate.reference))
    tables: dict[str, Table] = {}
    source = open_source(recipe.data, recipe.seed, store)
    kinds: tuple[tuple[str, Callable[[], TableWriter]], ...] = (
        ("images", lambda: ingest.plan(recipe, store, source)),
        ("selection", lambda: selection.plan(recipe, store, tables["images"])),
        ("captions", lambda: caption.plan(recipe, store, tables)),
    )
    for kind, plan in kinds:
        writer = plan()
        if not writer.is_committed:
            raise FidelityError(
                f"{writer.folder.uri}: the recipe's {kind} table is not there; make it with pixart "
                f"run, or name a caption table with --set evaluate.reference=FOLDER"
            )
        tables[kind] = Table.open(writer.folder)
    return tables


def choose_rows(captions: Table, count: int, seed: int) -> tuple[tuple[Place, ...], list[str]]:
    """``count`` rows that are ok, in the table's order, with the first caption of each.

    Raises FidelityError where there are fewer.
    """
    counts = [file.counts.get(OK, 0) for file in captions.manifest.files]
    if count > sum(counts):
        raise FidelityError(
            f"evaluate.num_references = {count}: {captions.folder.uri} has {sum(counts)} rows that "
            f"are ok; ask for at most as many"
        )
    rng = np.random.default_rng([seed, 9])
    chosen = np.sort(rng.permutation(sum(counts))[:count])
    bounds = np.cumsum([0, *counts])
    places: list[Place] = []
    prompts: list[str] = []
    for k in np.unique(np.searchsorted(bounds, chosen, side="right") - 1).tolist():
        rows = captions.read(k, ["status", "captions"]).to_pylist()
        ok = [i for i, row in enumerate(rows) if row["status"] == OK]
        mine = chosen[(chosen >= bounds[k]) & (chosen < bounds[k + 1])] - bounds[k]
        for i in (ok[n] for n in mine.tolist()):
            places.append((k, i))
            prompts.append(next(said for said in rows[i]["captions"] if said))
    return tuple(places), prompts


def read_references(images: str, places: Sequence[Place], side: int) -> Iterator[Picture]:
    """Pictures (side, side, 3) of rows of an image table, a row group at a time.

    Raises FidelityError for one that cannot be read any more.
    """
    table = open_cached(images)
    for (k, group), mine in groupby(places, lambda p: (p[0], p[1] // ROW_GROUP_ROWS)):
        with table.file(k) as file:
            found = file.read_row_group(group, ["id", "status", "source", "bytes", "uri"])
        rows = found.take([i % ROW_GROUP_ROWS for _, i in mine]).to_pylist()
        for row, picture in zip(rows, read_pictures(rows), strict=True):
            if picture is None or isinstance(picture, PictureError):
                raise FidelityError(f"{images}: {row['source']}: {picture or row['status']}")
            yield fit(picture, Size(side, side))


def _fit_extractor(images: str, places: Sequence[Place], side: int) -> bytes:
    return PcaExtractor.fit([*read_references(images, places, side)]).dump()


@dataclass(frozen=True)
class _ReadReferences:
    images: str
    batches: Sequence[tuple[Place, ...]]
    prompts: Sequence[str]
    side: int

    def __call__(self, k: int) -> pa.Table:
        places = self.batches[k]
        start = sum(len(batch) for batch in self.batches[:k])
        pictures = read_references(self.images, places, self.side)
        return pa.table({
            "id": [f"{start + i:016x}" for i in range(len(places))],
            "prompt": [*self.prompts[start : start + len(places)]],
            "png": [encode_png(picture) for picture in pictures],
        })  # fmt: skip

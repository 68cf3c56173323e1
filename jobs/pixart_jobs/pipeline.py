"""The whole way, in order: ingest, select, caption, encode, the stages, evaluate.

Each job is found finished, continued or started by the digest of what it is asked for, so running
a pipeline again is resuming it. Jobs meet through tables and manifests only; this file alone knows
their order. Each job is a child run of the pipeline's run in MLflow and is charged for its cost.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pixart_jobs import caption, encode, evaluate, ingest, selection, stage, train
from pixart_jobs.evaluate import Evaluation
from pixart_jobs.fidelity import find_tables
from pixart_jobs.promote import promote
from pixart_jobs.recipe import SAMPLES, Recipe
from pixart_jobs.sources import open_source
from pixart_jobs.stage import StageInputs, StagePlan
from pixart_jobs.workspace import JobMonitor, Monitor, Workspace
from pixart_platform.accounting import Cost, measure
from pixart_platform.copies import publish
from pixart_platform.errors import PixartError, RecipeError
from pixart_platform.machine import describe_machine, list_packages
from pixart_platform.manifest import current_commit, load_manifest
from pixart_platform.partitions import Progress
from pixart_platform.recipe import digest_of
from pixart_platform.registry import PARENT_TAG, Registry, Version
from pixart_platform.storage import open_folder, write_atomic
from pixart_platform.tables import OK, Table, TableWriter, find_rejects
from pixart_platform.tracking import Tracker, bury

_SHOWN_REJECTS = 1000  # of each table, in the report
_Tables = Callable[[], dict[str, Table]]


@dataclass(frozen=True)
class StageResult:
    """A finished stage with its version and curve of (images seen, loss)."""

    plan: StagePlan
    version: Version
    losses: list[tuple[int, float]]


@dataclass
class Result:
    """Everything a report tells of a pipeline."""

    recipe: Recipe
    tables: dict[str, Table]
    caption_accuracy: float | None
    stages: list[StageResult]
    evaluations: list[Evaluation]
    cost: Cost
    tracking_uri: str
    rejects: list[dict[str, str]] = field(default_factory=list)  # the first of each table
    num_rejected: int = 0

    @property
    def version(self) -> Version:
        return self.stages[-1].version

    @property
    def metrics(self) -> dict[str, float]:
        """Of all suites."""
        return {k: v for found in self.evaluations for k, v in found.metrics.items()}


class Pipeline:
    """Runs a recipe's jobs in one workspace: ``run`` all of them, ``train`` one stage."""

    def __init__(
        self, recipe: Recipe, space: Workspace, monitor: Monitor,
        parent: Tracker | None = None, tags: Mapping[str, str] | None = None,
        asked: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """``parent`` is the run in MLflow that this pipeline's run, with ``tags``, is part of;
        suites ``asked`` are whoever's evaluates afterwards, and must be possible."""
        self._recipe, self._space, self._monitor = recipe, space, monitor
        self._parent, self._tags, self._asked = parent, dict(tags or {}), asked
        self._identity = digest_of(recipe.model_dump(mode="json", exclude={"plan"}))
        self._registry = Registry(space.tracking_uri, recipe.name)
        self._rejects: list[dict[str, str]] = []
        self._num_rejected = 0
        self._keys: set[str] = set()  # what this pipeline consists of, made now or earlier

    def run(self, *, promote_result: bool = True) -> Result:
        """The whole way. Raises PixartError or ModelInputError for what a user can mend."""
        with self._recorded():
            result = self._run_jobs(promote_result)
            self._run.log_metrics(result.cost.as_metrics(), 0)
        return result

    def train(self, name: str) -> StageResult:
        """Tables, then stage ``name`` alone: its previous one is the registry's newest good."""
        if name not in self._recipe.stages:
            known = ", ".join(self._recipe.stages)
            raise RecipeError(f"stage {name!r} is not in the recipe; it has {known}")
        with self._recorded():
            (result,) = self._train_stages(self.make_tables(), [name])
        return result

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """The pipeline's run in MLflow, with how it ended."""
        bury(self._space.tracking_uri, self._recipe.name)
        params = self._recipe.model_dump(mode="json", exclude={"accounting", "plan"})
        self._run = self._start_run("pipeline", self._identity, self._parent, params)
        origin = {"git_commit": current_commit(), "workspace": str(self._space.root)}
        self._run.set_tags(origin | describe_machine() | self._tags)
        self._run.log_text(list_packages(), "packages.txt")
        try:
            yield
        except BaseException as error:  # Ctrl-C ends a run, too
            self._run.finish(_end_of(error))
            raise
        self._run.finish()

    def _run_jobs(self, promote_result: bool) -> Result:
        self._check_suites({})
        tables = self.make_tables()
        self._check_suites(tables)
        accuracy = None
        if self._recipe.data.source in SAMPLES:  # no other knows the truth
            accuracy = caption.measure_accuracy(tables["images"], tables["captions"])
            self._monitor.note(f"captions exactly right: {accuracy:.1%}")
        density = caption.measure_density(tables["images"], tables["captions"])
        self._run.log_metrics(density, 0)
        self._monitor.note(
            f"nouns a caption: {density['raw_nouns_per_caption']:.1f} raw, "
            f"{density['dense_nouns_per_caption']:.1f} dense"
        )
        stages = self._train_stages(tables, self._recipe.stages)
        suites = self._recipe.suites
        evaluations = self._evaluate(
            stages[-1].version, suites, self._find_references(lambda: tables), self._run
        )
        result = Result(
            self._recipe, tables, accuracy, stages, evaluations, self.cost_of(self._keys),
            self._space.tracking_uri, self._rejects, self._num_rejected,
        )  # fmt: skip
        if promote_result and suites:
            version = self._registry.get(str(result.version.number))  # with its figures
            promote(self._recipe, self._registry, version, why=f"pipeline {self._identity}")
        elif promote_result:
            self._monitor.note("not promoted: evaluate.suites names none to judge these images")
        return result

    def make_tables(self) -> dict[str, Table]:
        """What the stages read, by kind; latents by resolution, as ``latents-32``."""
        recipe, root = self._recipe, self._space.open_store(self._recipe.data.store)
        source = open_source(recipe.data, recipe.seed, root)
        images = self._make(
            "ingest", ingest.plan(recipe, root, source), lambda w: ingest.run(recipe, source, w)
        )
        tables = {"images": images}
        self._require_rows(images, images)
        tables["selection"] = self._make(
            "select", selection.plan(recipe, root, images),
            lambda w: selection.run(recipe, images, w),
        )  # fmt: skip
        self._require_rows(images, tables["selection"], images)
        tables["captions"] = self._make(
            "caption", caption.plan(recipe, root, tables), lambda w: caption.run(recipe, tables, w),
            recipe.caption.num_workers * recipe.caption.num_gpus,
        )  # fmt: skip
        self._require_rows(images, tables["captions"], tables["selection"])
        text, latents = encode.plan(recipe, root, tables)
        writers = [text, *latents.values()]
        self._keys.update(writer.folder.name for writer in writers)
        if not all(writer.is_committed for writer in writers):
            adopted = min(writer.adopt() for writer in writers)
            num_gpus = recipe.encode.num_workers * recipe.encode.num_gpus
            with self._job(
                "encode", text.folder.name, text.num_partitions, num_gpus=num_gpus
            ) as job:
                self._consume(job, adopted, encode.run(recipe, tables, text, latents))
                encode.commit(recipe, text, latents)
        made = {f"latents-{side}": Table.open(writer.folder) for side, writer in latents.items()}
        # All resolutions are made from one decode, so that all reject the same rows.
        self._require_rows(images, next(iter(made.values())), tables["selection"])
        return tables | {"text": Table.open(text.folder)} | made

    def _make(
        self, name: str, writer: TableWriter, run: Callable[[TableWriter], Progress],
        num_gpus: float = 0,
    ) -> Table:  # fmt: skip
        """One table: found finished, or made from where it was left."""
        self._keys.add(writer.folder.name)
        if not writer.is_committed:
            adopted = writer.adopt()
            with self._job(
                name, writer.folder.name, writer.num_partitions, num_gpus=num_gpus
            ) as job:
                self._consume(job, adopted, run(writer))
                writer.commit()
        return Table.open(writer.folder)

    def _require_rows(self, images: Table, table: Table, earlier: Table | None = None) -> None:
        """Tell of the rows this table rejected; raise PixartError when none is left."""
        before = earlier.manifest.counts.get(OK, 0) if earlier else table.manifest.num_rows
        left = table.manifest.counts.get(OK, 0)
        if left < before:
            shown = list(islice(find_rejects(images, table, earlier), _SHOWN_REJECTS))
            self._rejects += shown
            self._num_rejected += before - left
            self._monitor.note(
                f"{before - left} of {before} rows rejected in {table.folder.name}, first: "
                f"{shown[0]['source']}: {shown[0]['status']}"
            )
        if not left:
            raise PixartError(
                f"{table.folder.uri}: every row was rejected; see its 'status' column"
            )

    def _consume(self, job: "JobMonitor", adopted: int, progress: Progress) -> None:
        for done, _ in enumerate(progress, start=adopted + 1):
            job.reach(done)

    def _train_stages(self, tables: dict[str, Table], names: Collection[str]) -> list[StageResult]:
        results: list[StageResult] = []
        for number, (name, settings) in enumerate(self._recipe.stages.items(), start=1):
            if name not in names:
                continue
            parent = self._find_parent(settings.start_from, number, results)
            latents = tables[f"latents-{settings.resolution}"]
            inputs = StageInputs(
                tables["images"], tables["text"], latents, _snapshot_of(parent, results)
            )
            plan = stage.plan(self._recipe, name, inputs, self._space.root / "stages")
            self._keys.add(plan.folder.name)
            tracker = self._start_run(
                name, plan.digest, self._run, settings.model_dump(mode="json")
            )
            tracker.set_tags({PARENT_TAG: str(parent.number) if parent else ""})
            if not plan.is_finished:
                for table in (inputs.images, inputs.text, latents):
                    tracker.log_table(table, "training")
                shared = self._recipe.train
                num_gpus = shared.num_workers if shared.use_gpu else 0
                with self._job(
                    name, plan.folder.name, plan.num_images, "images", tracker, num_gpus
                ) as job:
                    train.run(plan, tracker, self._space.scratch, job.reach, self._monitor.note)
            version = self._register(plan, number, tracker, parent)
            tracker.finish()
            results.append(StageResult(plan, version, tracker.history("loss")))
        return results

    def _find_parent(
        self, start_from: str, number: int, results: list[StageResult]
    ) -> Version | None:
        if start_from == "scratch":
            return None
        if start_from == "previous" and results:
            return results[-1].version
        earlier = f"stage{number - 1}"
        reference = earlier if start_from == "previous" else start_from.removeprefix("registry:")
        return self._registry.get(reference)

    def _register(
        self, plan: StagePlan, number: int, tracker: Tracker, parent: Version | None
    ) -> Version:
        tags = {
            "stage": plan.name,
            "stage_digest": plan.digest,
            "recipe_digest": self._identity,
            PARENT_TAG: str(parent.number) if parent else "",
            "images_seen": str(plan.num_images),
            **{f"input_{name}": digest for name, digest in plan.inputs.digests().items()},
        }
        place = open_folder(plan.snapshot_folder)
        if kept := self._recipe.train.snapshots:
            digest = load_manifest(place).digest
            place = open_folder(kept) / f"{plan.folder.name}-{digest}"
            publish(plan.snapshot_folder, place)
        version = self._registry.register(place, tracker.run_id, tags)
        self._registry.set_alias(f"stage{number}", version)
        return version

    def _check_suites(self, tables: dict[str, Table]) -> None:
        """Raise what evaluation would at the end, before the work: those that need tables, then."""
        side = [*self._recipe.stages.values()][-1].resolution
        root = self._space.root / "evaluations"
        for name in [*self._recipe.suites, *self._asked]:
            if tables or name != "fidelity" or self._recipe.evaluate.reference:
                find = self._find_references(lambda: tables)
                evaluate.open_suite(name, self._recipe, side, root, find)

    def _find_references(
        self, own: Callable[[], dict[str, Table]]
    ) -> Callable[[], dict[str, Table]]:
        """The recipe's reference if it names one, else its own tables."""
        if not self._recipe.evaluate.reference:
            return own
        return partial(find_tables, self._recipe, self._space.open_store(""))

    def evaluate(self, version: Version, suites: Sequence[str]) -> list[Evaluation]:
        """Any version with these suites. Raises PixartError or ModelInputError."""
        store = self._space.open_store(self._recipe.data.store)
        find = partial(find_tables, self._recipe, store)
        return self._evaluate(version, suites, find, None)

    def _evaluate(
        self, version: Version, suites: Sequence[str], find: _Tables,
        parent: Tracker | None,
    ) -> list[Evaluation]:  # fmt: skip
        root = self._space.root / "evaluations"
        here = version.fetch()
        plans = [evaluate.plan(self._recipe, s, here, root, find) for s in suites]
        for plan in plans:
            name = plan.folder.name
            self._keys.add(name)
            tracker = self._start_run("evaluate", name, parent, plan.settings)
            if not plan.is_finished:
                with self._job("evaluate", name, plan.num_drawn, "pictures", tracker) as job:
                    evaluate.run(self._recipe, plan, job.reach)
            evaluate.record(self._registry, version, plan, tracker)
            tracker.finish()
        return [evaluate.load(plan) for plan in plans]

    def _start_run(
        self, name: str, identity: str, parent: Tracker | None, params: dict[str, Any]
    ) -> Tracker:
        return Tracker.start(
            self._space.tracking_uri, self._recipe.name, f"{name}:{identity}", name,
            artifacts=self._space.root, parent=parent, params=params,
        )  # fmt: skip

    @contextmanager
    def _job(
        self, name: str, key: str, total: int, unit: str = "partitions",
        tracker: Tracker | None = None, num_gpus: float = 0,
    ) -> Iterator[JobMonitor]:  # fmt: skip
        """Show, time and charge one job; its cost is kept beside it, attempt by attempt."""
        try:
            with (
                measure(self._recipe.accounting, num_gpus) as cost,
                self._monitor.job(name, total, unit) as job,
            ):
                yield job
        except BaseException as error:  # Ctrl-C, too
            if tracker:
                tracker.finish(_end_of(error))
            raise
        finally:
            record = {"job": name, "key": key} | asdict(cost)
            name_of_attempt = f"{key}-{time.time_ns()}.json"
            write_atomic(self._space.costs / name_of_attempt, json.dumps(record).encode())
        if tracker:
            tracker.log_metrics(cost.as_metrics(), total)

    def cost_of(self, keys: Collection[str]) -> Cost:
        """Of the jobs with these keys (folders of tables and stages), all their attempts."""
        records = [json.loads(path.read_text()) for path in self._space.costs.glob("*.json")]
        mine = [record for record in records if record["key"] in keys]
        return Cost(**{name: sum(r.get(name, 0.0) for r in mine) for name in vars(Cost())})


def _end_of(error: BaseException) -> str:
    """How MLflow calls it."""
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _snapshot_of(version: Version | None, made: list[StageResult]) -> Path | None:
    """A parent's snapshot on this machine, where it was made or verified and fetched."""
    here = [r.plan.snapshot_folder for r in made if r.version == version]
    return here[0] if here else version.fetch() if version else None

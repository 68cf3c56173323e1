"""The whole way, in order: ingest, caption, encode, the stages, evaluate, evaluate.

Each job is found finished, continued or started by the digest of what it is asked for, so running
a pipeline again is resuming it. Jobs meet through tables and manifests only; this file alone knows
their order. Each job is a child run of the pipeline's run in MLflow and is charged for its cost.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pixart_jobs import caption, encode, evaluate, ingest, train
from pixart_jobs.evaluate import Evaluation
from pixart_jobs.recipe import Recipe
from pixart_jobs.train import StageInputs, StagePlan
from pixart_platform.accounting import Cost, measure
from pixart_platform.errors import PixartError
from pixart_platform.manifest import current_commit
from pixart_platform.recipe import digest_of
from pixart_platform.registry import Registry, Version
from pixart_platform.storage import write_atomic
from pixart_platform.tables import OK, Table
from pixart_platform.tracking import Tracker, sqlite_uri


class Monitor(Protocol):
    """Whoever shows progress."""

    @contextmanager
    def job(self, name: str, total: int, unit: str) -> Iterator["JobMonitor"]: ...

    def note(self, message: str) -> None: ...


class JobMonitor(Protocol):
    """Progress of one job."""

    def reach(self, done: int) -> None: ...


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
    evaluation: Evaluation | None
    cost: Cost
    tracking_uri: str
    rejects: list[dict[str, str]] = field(default_factory=list)

    @property
    def version(self) -> Version:
        return self.stages[-1].version


@dataclass(frozen=True)
class Workspace:
    """Where a pipeline keeps everything: one folder."""

    root: Path
    tracking_uri: str
    scratch: Path

    @classmethod
    def under(cls, root: Path, scratch: Path, tracking_uri: str | None = None) -> "Workspace":
        root.mkdir(parents=True, exist_ok=True)
        return cls(root, tracking_uri or sqlite_uri(root), scratch)

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    @property
    def costs(self) -> Path:
        return self.root / "costs"


def _own_rejects(table: Table, earlier: Table) -> Iterator[dict[str, str]]:
    """Rows that ``table`` rejected and ``earlier`` had not."""
    known = {row["id"] for row in earlier.rejects()}
    return (row for row in table.rejects() if row["id"] not in known)


class Pipeline:
    """Runs a recipe's jobs in one workspace. ``run`` is the only public step."""

    def __init__(self, recipe: Recipe, space: Workspace, monitor: Monitor) -> None:
        self._recipe, self._space, self._monitor = recipe, space, monitor
        self._identity = digest_of(recipe.model_dump(mode="json"))
        self._registry = Registry(space.tracking_uri, recipe.name)
        self._keys: set[str] = set()  # what this pipeline consists of, made now or earlier

    def run(self, *, promote_result: bool = True) -> Result:
        """The whole way. Raises PixartError or ModelInputError for what a user can mend."""
        params = self._recipe.model_dump(mode="json", exclude={"accounting"})
        self._run = self._start_run("pipeline", self._identity, None, params)
        self._run.set_tags({"git_commit": current_commit(), "workspace": str(self._space.root)})
        try:
            result = self._run_jobs(promote_result)
        except BaseException:
            self._run.finish("FAILED")
            raise
        self._run.log_metrics(result.cost.as_metrics(), 0)
        self._run.finish()
        return result

    def _run_jobs(self, promote_result: bool) -> Result:
        tables = self._make_tables()
        accuracy = caption.measure_accuracy(tables["images"], tables["captions"])
        if accuracy is not None:
            self._monitor.note(f"captions exactly right: {accuracy:.1%}")
        stages = self._train_stages(tables)
        evaluation = None
        if self._recipe.data.source == "digits":
            evaluation = self._evaluate(stages[-1])
            if promote_result:
                evaluate.promote(
                    self._recipe, self._registry, stages[-1].version, evaluation.metrics
                )
        elif promote_result:
            self._monitor.note("not promoted: the digits suite cannot judge other images")
        rejects = [*tables["images"].rejects(), *_own_rejects(tables["captions"], tables["images"])]
        return Result(
            self._recipe, tables, accuracy, stages, evaluation, self._total_cost(),
            self._space.tracking_uri, rejects,
        )  # fmt: skip

    def _make_tables(self) -> dict[str, Table]:
        recipe, root = self._recipe, self._space.tables
        writer, num_partitions = ingest.plan(recipe, root)
        self._keys.add(writer.folder.name)
        if not writer.is_committed:
            with self._job("ingest", writer.folder.name, num_partitions) as job:
                self._consume(job, ingest.run(recipe, writer))
                writer.commit(num_partitions)
        images = Table.open(writer.folder)
        self._require_rows(images, list(images.rejects()))

        writer = caption.plan(recipe, root, images)
        self._keys.add(writer.folder.name)
        if not writer.is_committed:
            with self._job("caption", writer.folder.name, num_partitions) as job:
                self._consume(job, caption.run(recipe, images, writer))
                writer.commit(num_partitions)
        captions = Table.open(writer.folder)
        self._require_rows(captions, list(_own_rejects(captions, images)))

        text, latents = encode.plan(recipe, root, images, captions)
        self._keys.add(text.folder.name)
        if not all(w.is_committed for w in (text, *latents.values())):
            with self._job("encode", text.folder.name, num_partitions) as job:
                self._consume(job, encode.run(recipe, images, captions, text, latents))
                text_extra, latent_extra = encode.describe_encoders(recipe.encode)
                text.commit(num_partitions, text_extra)
                for latent_writer in latents.values():
                    latent_writer.commit(num_partitions, latent_extra)
        tables = {"images": images, "captions": captions, "text": Table.open(text.folder)}
        return tables | {f"latents-{r}": Table.open(w.folder) for r, w in latents.items()}

    def _require_rows(self, table: Table, rejects: list[dict[str, str]]) -> None:
        """Tell of the rows this table rejected; raise PixartError when none is left."""
        if rejects:
            first = rejects[0]
            place = first.get("source", first["id"][:12])
            self._monitor.note(
                f"{len(rejects)} of {table.manifest.num_rows} rows rejected in "
                f"{table.folder.name}, first: {place}: {first['status']}"
            )
        if not table.manifest.counts.get(OK):
            raise PixartError(f"{table.folder}: every row was rejected; see its 'status' column")

    def _consume(self, job: "JobMonitor", progress: ingest.Progress) -> None:
        for done, _ in enumerate(progress, start=1):
            job.reach(done)

    def _train_stages(self, tables: dict[str, Table]) -> list[StageResult]:
        results: list[StageResult] = []
        for number, (name, settings) in enumerate(self._recipe.stages.items(), start=1):
            parent = self._find_parent(settings.start_from, results)
            latents = tables[f"latents-{settings.resolution}"]
            inputs = StageInputs(
                tables["images"], tables["text"], latents, parent.folder if parent else None
            )
            plan = train.plan(self._recipe, name, inputs, self._space.root / "stages")
            self._keys.add(plan.folder.name)
            tracker = self._start_run(
                name, plan.digest, self._run, settings.model_dump(mode="json")
            )
            if not plan.is_finished:
                for table in (inputs.images, inputs.text, latents):
                    tracker.log_table(table, "training")
                with self._job(name, plan.folder.name, plan.num_images, "images", tracker) as job:
                    train.run(plan, tracker, self._space.scratch, job.reach)
            version = self._register(plan, number, tracker, parent)
            tracker.finish()
            results.append(StageResult(plan, version, tracker.history("loss")))
        return results

    def _find_parent(self, start_from: str, results: list[StageResult]) -> Version | None:
        if start_from == "scratch":
            return None
        if start_from == "previous":
            return results[-1].version
        reference = start_from.removeprefix("registry:")
        version = self._registry.get(reference)
        version.verify()
        return version

    def _register(
        self, plan: StagePlan, number: int, tracker: Tracker, parent: Version | None
    ) -> Version:
        tags = {
            "stage": plan.name,
            "stage_digest": plan.digest,
            "recipe_digest": self._identity,
            "parent_version": str(parent.number) if parent else "",
            **{f"input_{name}": digest for name, digest in plan.inputs.digests().items()},
        }
        version = self._registry.register(plan.snapshot_folder, tracker.run_id, tags)
        self._registry.set_alias(f"stage{number}", version)
        return version

    def _evaluate(self, last: StageResult) -> Evaluation:
        recipe = self._recipe
        plan = evaluate.plan(recipe, last.plan.snapshot_folder, self._space.root / "evaluations")
        self._keys.add(plan.folder.name)
        tracker = self._start_run("evaluate", plan.folder.name, self._run, plan.settings)
        if not plan.is_finished:
            total = recipe.evaluate.num_prompts
            with self._job("evaluate", plan.folder.name, total, "pictures", tracker) as job:
                evaluate.run(recipe, plan, job.reach)
        found = evaluate.load(plan)
        tracker.log_metrics(found.metrics, last.plan.num_images)
        tracker.finish()
        self._registry.tag(last.version, {k: f"{v:.4f}" for k, v in found.metrics.items()})
        return found

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
        tracker: Tracker | None = None,
    ) -> Iterator[JobMonitor]:  # fmt: skip
        """Show, time and charge one job; its cost is kept beside it, attempt by attempt."""
        try:
            with (
                measure(self._recipe.accounting) as cost,
                self._monitor.job(name, total, unit) as job,
            ):
                yield job
        except BaseException:
            if tracker:
                tracker.finish("FAILED")
            raise
        record = {"job": name, "key": key} | asdict(cost)
        name_of_attempt = f"{key}-{time.time_ns()}.json"
        write_atomic(self._space.costs / name_of_attempt, json.dumps(record).encode())
        if tracker:
            tracker.log_metrics(cost.as_metrics(), total)

    def _total_cost(self) -> Cost:
        """Over all jobs of this pipeline, including those that earlier starts finished."""
        records = [json.loads(path.read_text()) for path in self._space.costs.glob("*.json")]
        mine = [record for record in records if record["key"] in self._keys]
        return Cost(**{name: sum(r[name] for r in mine) for name in vars(Cost())})

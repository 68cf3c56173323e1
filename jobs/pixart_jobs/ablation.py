"""``pixart ablate``: variants of a recipe, each trained to the same compute, and what it bought.

A study is a grid of variants and seeds. Each run of it is a pipeline of its own folder and digest,
so a study is resumed by running it again, and all runs share one store of tables. States are kept
along the way; the averaged weights of each are asked the first suite's prompts afterwards, so
training waits for none of it and quality is known as a function of compute. From that follow, over
the seeds, the quality at the end and the compute to a target, and its ratio to the baseline's.

Compute is that of training, forward and backward, as ``pixart_models.forecast`` counts it.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import ray
from pydantic import Field, model_validator

from pixart_jobs.caption import measure_density
from pixart_jobs.evaluate import open_suite
from pixart_jobs.fidelity import find_tables
from pixart_jobs.pipeline import Pipeline, Result, StageResult
from pixart_jobs.planner import change, stage_flops
from pixart_jobs.recipe import SUITE_METRICS, Metric, Recipe
from pixart_jobs.stage import StagePlan, average_of
from pixart_jobs.suites import Suite, Workers
from pixart_jobs.workspace import Monitor, Workspace
from pixart_models.autoencoder import load_autoencoder
from pixart_models.drawing import Drawer
from pixart_models.forecast import count_parameters
from pixart_models.pixart import PixArt
from pixart_models.text import load_text_encoder
from pixart_platform.engine import choose_accelerator
from pixart_platform.errors import PixartError, RecipeError
from pixart_platform.recipe import Section, digest_of, find_file, load_recipe
from pixart_platform.seeds import derive_seed
from pixart_platform.storage import open_folder, write_atomic
from pixart_platform.tracking import Tracker

STUDIES = Path(__file__).parent / "studies"
_LOG = "run.log"
_RETRIES = 3  # of a run whose node is lost; it goes on from its newest state
_Compute = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ReadRecipe = Callable[[str, Sequence[str]], Recipe]
"""A recipe by name or path, with overrides ``path=value``."""


class StudyError(PixartError):
    """A study that cannot be run as it is written."""


class Study(Section):
    """A grid: every variant with every seed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Names the experiment in MLflow that groups its runs."""
    recipe: str
    """The recipe that is varied: a built-in one, or a .yaml file beside the study."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings by path that all variants share: ``train.num_workers: 1``; ``stages`` whole, too."""
    variants: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], dict[str, Any]] = Field(
        min_length=1
    )
    """Settings by path of each variant; none, to take the recipe as it is."""
    baseline: str = ""
    """The variant that the others are held against; left out, the first."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0, 1, 2), min_length=1)
    """Of data, weights and order alike."""
    tflops: _Compute | dict[str, _Compute] | None = None
    """Training of each run, in units of 10^12: all its stages are made longer or shorter by one
    factor to come to it. One for all, or by variant where one is sought that takes many times
    another's; of a variant that is left out, as long as its recipe says."""
    points: int = Field(8, ge=2, le=1000)
    """How often quality is measured along a run, about; states of as many are kept as it trains."""
    target: dict[Metric, float] = Field(min_length=1)
    """Quality whose compute is sought: ``digit_accuracy: 0.9``; of ``fid`` and ``kid``, at most."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Study":
        if self.baseline and self.baseline not in self.variants:
            raise ValueError(
                f"baseline = {self.baseline}: is no variant; there are {', '.join(self.variants)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: one is there twice")
        paths = [path for own in self.variants.values() for path in own]
        if shared := [p for p in paths if p.split(".")[0] in ("evaluate", "name", "seed")]:
            raise ValueError(
                f"variants: {shared[0]} must be the same for all of them: evaluate belongs under "
                f"'set'; the study's own 'name' and 'seeds' are its runs'"
            )
        unknown = set(self.tflops if isinstance(self.tflops, dict) else ()) - set(self.variants)
        if unknown:
            raise ValueError(
                f"tflops of {', '.join(sorted(unknown))}: is no variant; there are "
                f"{', '.join(self.variants)}"
            )
        return self

    def tflops_of(self, variant: str) -> float | None:
        return self.tflops.get(variant) if isinstance(self.tflops, dict) else self.tflops

    @property
    def reference(self) -> str:
        return self.baseline or next(iter(self.variants))


@dataclass(frozen=True)
class Run:
    """A variant with a seed, ready to be trained."""

    study: str
    variant: str
    seed: int
    recipe: Recipe
    suite: str

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


@dataclass(frozen=True)
class Point:
    """What a state of a run cost, and how well it draws."""

    stage: str
    images: int
    """Since the first stage."""
    flops: float
    seconds: float
    values: dict[str, float]
    """By metric."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    variant: str
    seed: int
    parameters: int
    flops: float
    seconds: float
    facts: dict[str, float]
    points: list[Point] = field(default_factory=list)

    @classmethod
    def load(cls, document: dict[str, Any]) -> "Outcome":
        points = [Point(**point) for point in document["points"]]
        return cls(**(document | {"points": points}))


def read_study(
    name_or_path: str, read: ReadRecipe, overrides: Sequence[str] = ()
) -> tuple[Study, list[Run]]:
    """A built-in study or a file's, and all its runs; ``overrides``, path=value, of all variants,
    before what is their own, become part of its ``set``. Raises RecipeError, StudyError."""
    path = find_file(name_or_path, STUDIES, "study")
    study = load_recipe(path, Study)
    base = str(path.parent / study.recipe) if Path(study.recipe).suffix else study.recipe
    shared = [*_as_overrides(study.set), *overrides]
    asked = dict(part.split("=", 1) for part in shared if "=" in part)
    if fixed := asked.keys() & {"name", "seed"}:
        raise StudyError(f"{fixed.pop()}: is told by the study's file, as 'name' and 'seeds'")
    runs = [
        _make_run(study, v, s, partial(read, base), shared)
        for s in study.seeds for v in study.variants
    ]  # fmt: skip
    if len(suites := {run.suite for run in runs}) > 1:
        raise StudyError(f"variants are asked {' and '.join(suites)}: 'set' one evaluate.suites")
    return study.model_copy(update={"set": asked}), runs


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{path}={json.dumps(value, default=str)}" for path, value in settings.items()]


def _make_run(
    study: Study, variant: str, seed: int, read: Callable[[Sequence[str]], Recipe],
    shared: Sequence[str],
) -> Run:  # fmt: skip
    own = study.variants[variant] | {"name": study.name, "seed": seed}
    try:
        recipe = read([*shared, *_as_overrides(own)])
    except RecipeError as error:
        raise StudyError(f"variant {variant}: {error}") from error
    if not recipe.suites:
        raise StudyError(
            f"variant {variant}: evaluate.suites is empty: a study needs one; write digits, "
            f"crowds, prompts:FILE or fidelity"
        )
    suite = recipe.suites[0]
    known = SUITE_METRICS.get(suite)
    others = {m for metrics in SUITE_METRICS.values() for m in metrics}
    missing = {"clip_score"} if suite == "fidelity" and not recipe.evaluate.clip else set()
    if wrong := [
        m for m in study.target if m in missing or (m not in known if known else m in others)
    ]:
        told = f"; it has {', '.join(m for m in known if m not in missing)}" if known else ""
        raise StudyError(
            f"variant {variant}: target = {', '.join(wrong)}: is nothing that the suite {suite} "
            f"measures{told}"
        )
    if not any(stage.condition_on == "text" for stage in recipe.stages.values()):
        raise StudyError(f"variant {variant}: no stage learns from captions; there is none to ask")
    if tflops := study.tflops_of(variant):
        share = tflops * 1e12 / sum(stage_flops(recipe, name) for name in recipe.stages)
        lengths = dict[str, int]()
        for name, stage in recipe.stages.items():
            steps = max(1, round(stage.images * share / stage.batch_images))
            lengths[f"stages.{name}.images"] = steps * stage.batch_images
        recipe = change(recipe, lengths)
    asked_images = sum(s.images for s in recipe.stages.values() if s.condition_on == "text")
    every = max(1, asked_images // study.points)
    recipe = change(recipe, {
        "evaluate.suites": [],  # measured here, at every point
        "train.save_every_images": every, "train.keep_every_images": every,
        "train.preview_every_images": max(s.images for s in recipe.stages.values()),
        "train.preview_prompts": [], "train.evaluate_images": 0,
    })  # fmt: skip
    return Run(study.name, variant, seed, recipe, suite)


def run_study(
    study: Study, runs: Sequence[Run], space: Workspace, monitor: Monitor,
    monitor_of: Callable[[Path], Monitor], num_parallel: int = 1,
) -> list[Outcome]:  # fmt: skip
    """All runs, those that were finished earlier included; ``num_parallel`` at a time.

    Each is a task of Ray's, which writes what it does to ``run.log`` in its folder; ``monitor``
    hears of each that ends. Raises what a run does: the others stay as they are, to go on with.
    """
    parent = Tracker.start(
        space.tracking_uri, study.name, f"study:{digest_of(study.model_dump(mode='json'))}",
        study.name, artifacts=space.root, params=study.model_dump(mode="json"),
    )  # fmt: skip
    outcomes = dict[str, Outcome]()
    try:
        with monitor.job("ablate", len(runs), "runs") as job:
            for run, ended in _execute_all(runs, space, parent.run_id, monitor_of, num_parallel):
                try:
                    found = outcomes[run.name] = ray.get(ended)
                except ray.exceptions.RayError:
                    monitor.note(f"{run.name} failed; {_folder(space, run) / _LOG} tells more")
                    raise
                if unknown := study.target.keys() - found.points[-1].values:
                    raise StudyError(f"target = {unknown.pop()}: is not among what was measured: "
                                     f"{', '.join(found.points[-1].values)}")  # fmt: skip
                ends = {m: found.points[-1].values[m] for m in study.target}
                parent.log_metrics({f"{run.variant}_{m}": v for m, v in ends.items()}, run.seed)
                told = ", ".join(f"{m} {value:.3f}" for m, value in ends.items())
                monitor.note(f"{run.name}: {told} after {found.flops / 1e12:.4g} TFLOPs")
                job.reach(len(outcomes))
    except BaseException as error:  # Ctrl-C, too
        parent.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    parent.finish()
    return [outcomes[run.name] for run in runs]


def _execute_all(
    runs: Sequence[Run], space: Workspace, parent: str,
    monitor_of: Callable[[Path], Monitor], num_parallel: int,
) -> Iterator[tuple[Run, ray.ObjectRef[Outcome]]]:  # fmt: skip
    """As they end."""
    waiting, asked = deque(runs), dict[Any, Run]()
    while waiting or asked:
        while waiting and len(asked) < num_parallel:
            run = waiting.popleft()
            asked[_execute.remote(run, space, parent, monitor_of)] = run
        (ended, *_), _ = ray.wait(list(asked))
        yield asked.pop(ended), ended


def _folder(space: Workspace, run: Run) -> Path:
    return space.root / "runs" / run.name


@ray.remote(num_cpus=0, max_retries=_RETRIES)
def _execute(
    run: Run, space: Workspace, parent: str, monitor_of: Callable[[Path], Monitor]
) -> Outcome:
    root = _folder(space, run)
    store = run.recipe.data.store or str(space.root / "tables")
    recipe = change(run.recipe, {"data.store": store})
    tags = {"study": run.study, "variant": run.variant, "seed": str(run.seed)}
    with TemporaryDirectory(prefix="pixart-study-") as scratch:  # this may be another node
        pipeline = Pipeline(
            recipe, Workspace.under(root, Path(scratch), space.tracking_uri),
            monitor_of(root / _LOG), Tracker(space.tracking_uri, parent), tags, [run.suite],
        )  # fmt: skip
        result = pipeline.run(promote_result=False)
    suites = _open_suites(run, root, store)
    place = root / f"measured-{_digest(run, result, suites)}.json"
    if not place.exists():
        outcome = _measure(run, result, pipeline, suites, root)
        write_atomic(place, json.dumps(asdict(outcome)).encode())
    return Outcome.load(json.loads(place.read_text()))


def _open_suites(run: Run, root: Path, store: str) -> dict[int, Suite]:
    """By the side of the pictures that a stage draws."""
    find = partial(find_tables, run.recipe, open_folder(store))
    sides = {s.resolution for s in run.recipe.stages.values() if s.condition_on == "text"}
    return {side: open_suite(run.suite, run.recipe, side, root, find) for side in sides}


def _digest(run: Run, result: Result, suites: dict[int, Suite]) -> str:
    """Of everything that decides what is measured."""
    recipe = run.recipe
    asked = {
        "suites": [
            [f"{suite.name}/{suite.revision}", suite.settings, _questions(suite, recipe)]
            for suite in suites.values()
        ],
        "draw": recipe.draw.model_dump(mode="json"), "kept": recipe.train.keep_every_images,
        "stages": [stage.plan.digest for stage in result.stages],
        "flops": [stage_flops(recipe, name) for name in recipe.stages],
    }  # fmt: skip
    return digest_of(asked)


def _measure(
    run: Run, result: Result, pipeline: Pipeline, suites: dict[int, Suite], root: Path
) -> Outcome:
    """Ask every kept state of the stages that learn from captions, as many at once as fit."""
    for suite in suites.values():
        for _ in suite.prepare(open_folder(root), Workers.of(run.recipe)):
            pass
    flops = seconds = 0.0
    images, asked = 0, []
    gpus = 1 if run.recipe.train.use_gpu else 0
    for stage in result.stages:
        took = pipeline.cost_of([stage.plan.folder.name]).seconds or math.nan  # killed just then
        for seen in stage.plan.states.complete() if _draws_prompts(stage) else []:
            cost = (images + seen, flops + stage_flops(run.recipe, stage.plan.name, seen),
                    seconds + took * seen / stage.plan.num_images)  # fmt: skip
            suite = suites[stage.plan.settings.resolution]
            answer = _judge.options(num_gpus=gpus).remote(stage.plan, seen, run, suite, str(root))
            asked.append((stage, cost, answer))
        images += stage.plan.num_images
        flops += stage_flops(run.recipe, stage.plan.name)
        seconds += took
    points = []
    for stage, cost, answer in asked:
        point = Point(stage.plan.name, *cost, ray.get(answer))
        points.append(point)
        tracker = Tracker(result.tracking_uri, stage.version.run_id)
        tracker.log_metrics(point.values | {"train_tflops": point.flops / 1e12}, point.images)
    network = result.stages[-1].plan.snapshot.network
    facts = measure_density(result.tables["images"], result.tables["captions"])
    return Outcome(run.variant, run.seed, count_parameters(network), flops, seconds, facts, points)


def _draws_prompts(stage: StageResult) -> bool:
    return stage.plan.settings.condition_on == "text"


@ray.remote(num_cpus=1)
def _judge(
    plan: StagePlan, images_seen: int, run: Run, suite: Suite, root: str
) -> dict[str, float]:
    """What a state's averaged weights draw of the suite's prompts, measured."""
    device, config, draw = choose_accelerator(), plan.snapshot, run.recipe.draw
    network = cast(PixArt, average_of(plan, plan.states.open(images_seen)).to(device))
    drawer = Drawer(
        config, network, load_autoencoder(config.autoencoder, str(device)),
        load_text_encoder(config.text_encoder, config.network.max_tokens, str(device)),
    )  # fmt: skip
    judge, rows = suite.make_judge(), list[dict[str, Any]]()
    prompts, seeds = _questions(suite, run.recipe)
    size = run.recipe.evaluate.batch_images
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        pictures = drawer.draw(
            some, seeds[first : first + size], steps=draw.num_steps, guidance=draw.guidance,
            guidance_rescale=draw.guidance_rescale,
        )  # fmt: skip
        rows += [{"seen": seen, "features": data} for seen, data in judge(list(pictures), some)]
    figures = suite.measure(rows, open_folder(root)).figures
    return {metric: f.value for metric, f in figures.items() if metric != "reader_accuracy"}


def _questions(suite: Suite, recipe: Recipe) -> tuple[list[str], list[int]]:
    """Prompts and seeds, the same as an evaluation's."""
    prompts, seed = [p for p in suite.prompts for _ in range(suite.copies)], recipe.evaluate.seed
    return prompts, [derive_seed(seed, "evaluate", i) for i in range(len(prompts))]

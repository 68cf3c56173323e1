"""``pixart plan``: what a recipe costs, and whether it fits, known before anything starts.

FLOPs and activations are ``pixart_models.forecast``'s, which are checked against torch and
measurements; time is FLOPs over an assumed share of an accelerator's peak, and money, energy and
carbon follow from time. What is assumed is printed with the plan. A recipe that cannot fit is
refused with the changes that make it fit, each of them computed. Needs no GPU, no Ray, no data.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Any, TypeVar, get_args

from pixart_jobs.recipe import SAMPLES, Recipe
from pixart_jobs.train_settings import StageSettings, TrainSettings
from pixart_models.config import NetworkConfig
from pixart_models.encoder_flops import size_autoencoder, size_text_encoder
from pixart_models.forecast import LIBRARIES, StepMemory, step_flops, step_memory
from pixart_models.token_drop import TokenDrop
from pixart_platform.accounting import Accelerator, Cost
from pixart_platform.errors import PixartError

GIB = 2**30
ZERO_STAGES = (0, 1, 2, 3)
BUCKET_BYTES = 10**9  # DeepSpeed's reduce_bucket_size, 5e8 elements, held whole in bf16
RUNTIME_BYTES = {True: 2 * GIB, False: int(0.6 * GIB)}  # GPU: context, NCCL, holes; CPU: imports
SCENE_BYTES = {"digits": 4_200, "crowds": 7_000}  # of a sample scene, measured
SCENE_TOKENS = {"digits": 12.3, "crowds": 20.7}
IMAGE_BYTES = 300_000
Changes = Mapping[str, Any]  # settings by path, as --set takes them
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


class PlanError(PixartError):
    """A recipe that does not fit. Each of ``ways`` holds the changes that make it fit."""

    def __init__(self, message: str, ways: list[Changes]) -> None:
        super().__init__(message)
        self.ways = ways


@dataclass(frozen=True)
class Machine:
    """The kind of accelerator a plan is made for."""

    name: str
    kind: Accelerator

    @property
    def on_gpu(self) -> bool:
        return not self.name.startswith("cpu")

    def seconds(self, flops: float, num_gpus: float, resolution: int, steps: int = 0) -> float:
        rate = self.kind.tflops * 1e12 * self.kind.mfu_at(resolution) * num_gpus
        return self.kind.start_seconds + steps * self.kind.step_seconds + flops / rate


@dataclass(frozen=True)
class StageMemory:
    """Bytes a worker holds: what follows from parameters, and what a picture of its batch adds."""

    parameters: int
    block_parameters: float
    activations: float
    scratch: float
    holes: tuple[float, float]  # of glibc: shares of activations, and of what gradients reuse
    on_gpu: bool

    def peak(self, micro_batch: int, zero_stage: int, num_workers: int) -> float:
        """Of a worker: weights, and by ZeRO stage gradients, moments, average and masters.

        Gradients come as activations go, so the larger of both counts. With bf16 the update then
        needs fp32 gradients and a temporary. On a CPU, where that is the same memory, a state that
        is being saved is there as a copy and as a file's bytes.
        """
        p, element = self.parameters, 2 if self.on_gpu else 4
        weights, gradients, optimizer = (
            1 / num_workers if zero_stage >= stage else 1 for stage in (3, 2, 1)
        )
        master = 4 * (self.on_gpu or zero_stage > 0)
        saved = 32 / num_workers * (not self.on_gpu)
        held = p * (element * weights + (12 + master) * optimizer + saved)
        held += 2 * element * self.block_parameters * (zero_stage == 3)  # gathered for use
        kept, sharded = micro_batch * self.activations, element * p * gradients
        backward = max(kept, sharded) + self.holes[0] * kept + self.holes[1] * min(kept, sharded)
        backward += micro_batch * self.scratch + BUCKET_BYTES * (zero_stage > 0 and self.on_gpu)
        update = sharded + p * 8 * optimizer * self.on_gpu
        return held + max(backward, update) + RUNTIME_BYTES[self.on_gpu]


@dataclass(frozen=True)
class JobCost:
    """A job on its accelerators."""

    name: str
    flops: float
    num_gpus: float
    cost: Cost

    @property
    def gpu_hours(self) -> float:
        return self.cost.seconds * self.num_gpus / 3600


@dataclass(frozen=True)
class StageCost(JobCost):
    """A stage: its network, and bytes a worker needs at ZeRO 0 to 3."""

    settings: StageSettings
    network: NetworkConfig
    parameters: int
    memory: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to. Encoding and tables are there if it is known how many rows."""

    recipe: Recipe
    machine: Machine
    encode: JobCost | None
    stages: list[StageCost]
    storage: dict[str, float]  # bytes

    @property
    def jobs(self) -> list[JobCost]:
        return [*([self.encode] if self.encode else []), *self.stages]


def make_plan(recipe: Recipe, gpu: str = "", mfu: float | None = None) -> Plan:
    """The plan of ``recipe`` on ``train.num_workers`` accelerators of kind ``gpu``.

    Left out, that is a100-80g where the recipe uses GPUs, else cpu. Raises PlanError when a stage
    does not fit, RecipeError or ModelInputError for what cannot be built.
    """
    name = gpu or ("a100-80g" if recipe.train.use_gpu else "cpu")
    kind = recipe.accounting.find_accelerator(name)
    machine = Machine(name, kind.model_copy(update={"mfu": mfu}) if mfu else kind)
    refuse_excess(recipe, machine)
    stages = [cost_stage(recipe, machine, stage) for stage in recipe.stages]
    rows = count_rows(recipe)
    encode = cost_encode(recipe, machine, rows) if rows else None
    return Plan(recipe, machine, encode, stages, measure_storage(recipe, stages, rows))


def count_rows(recipe: Recipe) -> int | None:
    """Pictures of the source, if anyone said how many."""
    scenes = recipe.data.num_scenes if recipe.data.source in SAMPLES else None
    return recipe.plan.num_images or scenes


def count_captions(recipe: Recipe) -> int:
    return len(recipe.caption.prompts) + recipe.caption.keep_raw


def mean_tokens(recipe: Recipe) -> float:
    """Tokens of a caption, at most as many as are kept."""
    known = SCENE_TOKENS.get(recipe.data.source, math.inf)
    return min(recipe.plan.text_tokens or known, recipe.encode.max_tokens)


def network_of(recipe: Recipe, stage: StageSettings) -> NetworkConfig:
    """A stage's network, its encoders known by name alone."""
    autoencoder = size_autoencoder(recipe.encode.autoencoder)
    return recipe.network_of(
        stage, factor=autoencoder.factor, channels=autoencoder.latent,
        text_width=size_text_encoder(recipe.encode.text_encoder).width,
    )  # fmt: skip


@lru_cache
def measure_memory(
    config: NetworkConfig, drop: TokenDrop | None, text_tokens: float, recompute: bool, on_gpu: bool
) -> StageMemory:
    """What grows with pictures, from the forecast of one; glibc's holes from that of many too.

    One picture's activations are less than the gradients, those of many are more.
    """
    side, many = config.sample_size, 10**6

    def forecast(batch: int) -> StepMemory:
        return step_memory(
            config, batch, side, side, text_tokens, drop, recompute=recompute,
            element_bytes=2 if on_gpu else 4, weight_bytes=1,
        )  # fmt: skip

    one, holes = forecast(1), (0.0, 0.0)
    parameters, kept = one.weights, one.activations
    if not on_gpu:
        far, hole = forecast(many), one.total - one.live
        reused = (many * hole - (far.total - far.live)) / (many * kept - far.gradients)
        holes = (hole / kept - reused, reused)
    scratch = one.workspace - LIBRARIES
    return StageMemory(parameters, parameters / config.depth, kept, scratch, holes, on_gpu)


def memory_of(recipe: Recipe, machine: Machine, name: str) -> StageMemory:
    """Of a stage's fullest step: all tokens if it finishes on them, captions as long as allowed."""
    stage = recipe.stages[name]
    finishes = stage.token_drop is not None and stage.token_drop.finish_share > 0
    return measure_memory(
        network_of(recipe, stage), None if finishes else recipe.token_drop_of(stage),
        recipe.encode.max_tokens if stage.condition_on == "text" else 0,
        recipe.train.recompute_blocks, machine.on_gpu,
    )  # fmt: skip


def stage_flops(recipe: Recipe, name: str, images: int | None = None) -> float:
    """Of training a stage, or its first ``images``; those that finish it see all tokens."""
    stage = recipe.stages[name]
    config, length = network_of(recipe, stage), stage.images // stage.batch_images
    text = mean_tokens(recipe) if stage.condition_on == "text" else 0
    dropped, whole = (
        step_flops(
            config, config.sample_size, config.sample_size, text, drop,
            recompute=recipe.train.recompute_blocks,
        ) for drop in (recipe.token_drop_of(stage), None)
    )  # fmt: skip
    share = stage.token_drop.finish_share if stage.token_drop else 1.0
    total = length * stage.batch_images
    seen = total if images is None else images
    early = min(seen, total * (1 - share))
    return early * dropped + (seen - early) * whole


def cost_stage(recipe: Recipe, machine: Machine, name: str) -> StageCost:
    """Whole batches, of which those after ``finish_share`` see all tokens."""
    stage, workers = recipe.stages[name], recipe.train.num_workers
    config, memory = network_of(recipe, stage), memory_of(recipe, machine, name)
    flops = stage_flops(recipe, name)
    steps = stage.images // stage.batch_images
    seconds = machine.seconds(flops, workers, stage.resolution, steps)
    cost = recipe.accounting.charge(machine.kind, seconds, workers)
    peaks = [memory.peak(micro_batch(recipe, stage), zero, workers) for zero in ZERO_STAGES]
    return StageCost(name, flops, workers, cost, stage, config, memory.parameters, tuple(peaks))


def cost_encode(recipe: Recipe, machine: Machine, rows: int) -> JobCost:
    """The autoencoder stays in fp32, which a GPU multiplies as TF32 at half the peak of bf16."""
    settings, autoencoder = recipe.encode, size_autoencoder(recipe.encode.autoencoder)
    text = size_text_encoder(settings.text_encoder).flops(mean_tokens(recipe))
    words = rows * count_captions(recipe) * text
    pictures = rows * sum(autoencoder.flops(side, side) for side in settings.resolutions)
    num_gpus = settings.num_workers * (settings.num_gpus or 1)
    timed = words + pictures * (2 if machine.on_gpu else 1)
    seconds = machine.seconds(timed, num_gpus, min(settings.resolutions))
    cost = recipe.accounting.charge(machine.kind, seconds, num_gpus)
    return JobCost("encode", words + pictures, num_gpus, cost)


def measure_storage(recipe: Recipe, stages: list[StageCost], rows: int | None) -> dict[str, float]:
    """Bytes of tables and checkpoints: bf16 features, fp16 moments, fp32 averages and snapshots."""
    found: dict[str, float] = {}
    if rows:
        known = SCENE_BYTES.get(recipe.data.source, IMAGE_BYTES)
        if recipe.data.copy_bytes:
            found["images"] = rows * (recipe.plan.image_bytes or known)
        width = size_text_encoder(recipe.encode.text_encoder).width
        found["text"] = 2 * rows * count_captions(recipe) * mean_tokens(recipe) * width
        autoencoder = size_autoencoder(recipe.encode.autoencoder)
        for side in recipe.encode.resolutions:
            positions = (side // autoencoder.factor) ** 2
            found[f"latents {side}px"] = rows * 4 * autoencoder.latent * positions
    states = 16 * (recipe.train.keep_states + 1)  # with the best: masters, moments, average
    found["states and snapshots"] = sum((states + 4) * s.parameters for s in stages)
    return found


def find_excess(recipe: Recipe, machine: Machine) -> dict[str, float]:
    """GiB by which stages are too large, the worst first."""
    train, over = recipe.train, {}
    for name, stage in recipe.stages.items():
        memory = memory_of(recipe, machine, name)
        need = memory.peak(micro_batch(recipe, stage), train.zero_stage, train.num_workers) / GIB
        if need > machine.kind.memory_gib:
            over[name] = need - machine.kind.memory_gib
    return dict(sorted(over.items(), key=lambda item: -item[1]))


def micro_batch(recipe: Recipe, stage: StageSettings) -> int:
    """The most images a worker takes at a time."""
    share = -(-stage.batch_images // recipe.train.num_workers)
    return -(-share // recipe.train.accumulate_of(stage.batch_images, recipe.train.num_workers))


def fitting_batch(recipe: Recipe, machine: Machine, name: str) -> int:
    """The most images of a stage that fit on each worker, of those it takes at a time."""
    memory, train = memory_of(recipe, machine, name), recipe.train
    return bisect_right(
        range(1, micro_batch(recipe, recipe.stages[name]) + 1), machine.kind.memory_gib * GIB,
        key=lambda batch: memory.peak(batch, train.zero_stage, train.num_workers),
    )  # fmt: skip


def refuse_excess(recipe: Recipe, machine: Machine) -> None:
    """Raise PlanError for a stage that does not fit, with what would."""
    over = find_excess(recipe, machine)
    if not over:
        return
    name, has, train = next(iter(over)), machine.kind.memory_gib, recipe.train
    ways = list(find_ways(recipe, machine, list(over)))
    blocks = "with" if train.recompute_blocks else "without"
    told = [" ".join(f"--set {p}={v}" for p, v in way.items()).lower() for way in ways]
    raise PlanError(
        f"stages {', '.join(over)}: too large. {micro_batch(recipe, recipe.stages[name])} images "
        f"of {name} on each {machine.name} need {over[name] + has:.1f} GiB, {over[name]:.1f} more "
        f"than its {has:g}, at ZeRO {train.zero_stage} {blocks} recompute_blocks; "
        f"{fitting_batch(recipe, machine, name)} would fit. "
        + (f"Any one of these will do: {' | '.join(told)}" if ways else "Choose one with more"),
        ways,
    )


def find_ways(recipe: Recipe, machine: Machine, names: list[str]) -> Iterator[Changes]:
    """Changes that make the recipe fit, fewest and smallest first; what is trained stays the same.

    Accumulating smaller parts of a batch comes last, since small products use less of a GPU.
    """
    train, found = recipe.train, False
    common = math.gcd(*(stage.batch_images for stage in recipe.stages.values()))
    workers = (n for n in range(train.num_workers + 1, min(common, 1024) + 1) if not common % n)
    allowed = get_args(TrainSettings.model_fields["zero_stage"].annotation)
    knobs: list[list[tuple[str, Any]]] = [
        [] if train.recompute_blocks else [("train.recompute_blocks", True)],
        [("train.zero_stage", zero) for zero in allowed if zero > train.zero_stage],
        [("train.num_workers", number) for number in workers],
    ]
    for number in range(1, len(knobs) + 1):
        for chosen in [] if found else list(combinations(knobs, number)):
            ways = (dict(way) for way in product(*chosen))
            fitting = (way for way in ways if not find_excess(change(recipe, way), machine))
            if way := next(fitting, None):
                found = True
                yield way
    if images := min(fitting_batch(recipe, machine, name) for name in names):
        yield {"train.micro_batch_images": images}


def change(recipe: AnyRecipe, changes: Changes) -> AnyRecipe:
    """The recipe with settings replaced, validated again."""
    document = recipe.model_dump()
    for path, value in changes.items():
        *sections, last = path.split(".")
        node = document
        for section in sections:
            node = node[section]
        node[last] = value
    return type(recipe).model_validate(document)

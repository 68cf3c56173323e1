"""A plan in print: work, memory and cost of each stage, storage, and all that was assumed."""

from collections.abc import Sequence

from pixart_jobs.planner import (
    BUCKET_BYTES,
    GIB,
    RUNTIME_BYTES,
    ZERO_STAGES,
    JobCost,
    Plan,
    StageCost,
    count_rows,
    mean_tokens,
    micro_batch,
)
from pixart_platform.accounting import carbon_intensity

PAPER = "PixArt-alpha as published: 753 A100-days, $28,400 (arXiv 2310.00426v3, table 2)"


def print_plan(plan: Plan) -> str:
    """The whole sheet, a paragraph a question."""
    recipe, machine = plan.recipe, plan.machine
    blocks = [
        [f"{recipe.name} on {recipe.train.num_workers} x {machine.name}"],
        format_table([_WORK, *(_work(stage) for stage in plan.stages)]),
        ["GiB of each worker by ZeRO stage, * as the recipe has it",
         *format_table([_MEMORY, *(_memory(plan, stage) for stage in plan.stages)])],
        _cost(plan),
        _storage(plan),
        ["assumed", *(f"  - {line}" for line in _assumptions(plan))],
    ]  # fmt: skip
    return "\n\n".join("\n".join(block) for block in blocks)


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


_WORK = (
    "stage", "px", "parameters", "images", "batch", "steps", "image tokens", "GFLOPs/image", "FLOPs"
)  # fmt: skip


def _work(stage: StageCost) -> list[str]:
    batch = stage.settings.batch_images
    steps = stage.settings.images // batch
    images = steps * batch
    return [
        stage.name, f"{stage.settings.resolution}", f"{stage.parameters:,}", f"{images:,}",
        f"{batch:,}", f"{steps:,}", f"{images * stage.network.base_grid**2:.3g}",
        f"{stage.flops / images / 1e9:,.4g}", f"{stage.flops:.3g}",
    ]  # fmt: skip


_MEMORY = ("stage", "images", *(f"ZeRO {zero}" for zero in ZERO_STAGES), "has")


def _memory(plan: Plan, stage: StageCost) -> list[str]:
    own = plan.recipe.train.zero_stage
    return [
        stage.name, f"{micro_batch(plan.recipe, stage.settings)}",
        *(f"{need / GIB:.2f}{'*' if zero == own else ' '}"
          for zero, need in enumerate(stage.memory)),
        f"{plan.machine.kind.memory_gib:g}",
    ]  # fmt: skip


def _cost(plan: Plan) -> list[str]:
    published = plan.recipe.plan.published_gpu_days
    groups: dict[str, Sequence[JobCost]] = {job.name: [job] for job in plan.jobs}
    groups |= {"training": plan.stages, "total": plan.jobs}
    told = published | {"training": sum(published.values())}
    rows = [["job", "GPU-hours", "GPU-days", "time", "$", "kWh", "kg CO2", "published", "differs"]]
    for name, jobs in groups.items():
        usd, kwh, co2_kg, seconds = (
            sum(getattr(job.cost, part) for job in jobs)
            for part in ("usd", "kwh", "co2_kg", "seconds")
        )
        hours, known = sum(job.gpu_hours for job in jobs), told.get(name)
        rows.append(
            [
                name, f"{hours:,.4g}", f"{hours / 24:,.4g}", _duration(seconds), f"{usd:,.0f}",
                f"{kwh:,.3g}", f"{co2_kg:,.3g}", f"{known:,.1f}" if known else "-",
                f"{hours / 24 / known - 1:+.0%}" if known else "-",
            ]
        )  # fmt: skip
    return [*format_table(rows), PAPER]


def _storage(plan: Plan) -> list[str]:
    rows = count_rows(plan.recipe)
    lines = [f"storage, {rows:,} pictures" if rows else "storage; set plan.num_images for tables"]
    table = [[f"  {name}", f"{size / 1e9:,.2f} GB"] for name, size in plan.storage.items()]
    return [
        *lines,
        *format_table([*table, ["  total", f"{sum(plan.storage.values()) / 1e9:,.2f} GB"]]),
    ]


def _assumptions(plan: Plan) -> list[str]:
    recipe, machine, kind = plan.recipe, plan.machine, plan.machine.kind
    shares = sorted({s.settings.resolution for s in plan.stages})
    mfu = ", ".join(f"{kind.mfu_at(side):.1%} at {side} px" for side in shares)
    if not isinstance(kind.mfu, float):
        mfu += " (the recipe's: a stage alone at its resolution may have been its measure)"
    country, runtime = recipe.accounting.country, RUNTIME_BYTES[machine.on_gpu] / GIB
    return [
        f"{machine.name}: {kind.tflops:g} TFLOP/s, {kind.watts:g} W with host and cooling, "
        f"${kind.usd_per_hour:g} an hour, of which training uses (MFU) {mfu}; beside that "
        f"{kind.step_seconds:g} s a step and {kind.start_seconds:g} s a job",
        "FLOPs: matrix products and attention, a multiply-add 2, backward twice forward"
        + (", blocks' forward once more" if recipe.train.recompute_blocks else "")
        + "; aspect buckets count as squares",
        f"captions: {mean_tokens(recipe):g} tokens, in memory {recipe.encode.max_tokens}",
        "token_drop: FLOPs of the tokens each block sees, all of them in finish_share; memory of "
        "the fuller",
        "memory: "
        + ("weights, gradients in bf16" if machine.on_gpu else "weights, gradients in fp32")
        + f"; fp32 masters, AdamW and the average by ZeRO stage; ZeRO 3 gathers two blocks at a "
        f"time; {runtime:g} GiB for the runtime"
        + (f"; buckets of {BUCKET_BYTES / 1e9:g} GB from ZeRO 1 on" if machine.on_gpu else ""),
        f"{country}: {carbon_intensity(country):.3f} kg CO2 a kWh (codecarbon)",
        f"encode: T5's and the autoencoder's formulas by the encoders' names, at the smallest "
        f"resolution's MFU, {'the autoencoder in TF32, ' if machine.on_gpu else ''}no padding",
        f"states: {recipe.train.keep_states} of each stage and the best, and its snapshot",
        "not counted: ingest, captioning, evaluation, previews, waiting for data, lost work",
    ]

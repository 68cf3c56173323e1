"""What a plan asks of everything but its accelerators: bytes a second, object store, files, states.

Each figure follows from the recipe, the plan's forecast and how the code reads and writes; what is
a cloud's own is listed as assumed. ``grown`` is the same recipe with so many times the pictures and
accelerators, to see what breaks first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pixart_jobs.plan_sheet import format_table
from pixart_jobs.planner import Plan, PlanError, StageCost, count_rows
from pixart_platform.batches import READ_THREADS, SCAN_THREADS
from pixart_platform.tables import ROW_GROUP_ROWS

_GB, _GIB = 1e9, 1 << 30
PER_NODE = 8
# Of a p4d.24xlarge, as AWS states it: memory, local NVMe, network.
NODE_MEMORY, NODE_DISK, NODE_NETWORK = 1152 * _GIB, 8e12, 50e9
_CACHE_SHARE = 0.5  # of a disk, for copies of tables (copies.py)
_STORE_SHARE = 0.3  # of a node's memory is Ray's object store
_S3_STREAM = 80e6  # bytes a second of one request, by AWS's guide to S3's performance
_S3_REQUESTS = 5500  # GETs a second of a prefix, by the same
_ROUND_TRIP = 0.05  # seconds, as S3 answers
_IDLE_SHARE = 0.01  # of the training, that may be spent on getting ready
_SHOWN_SHARE = 0.005
_ROW_BYTES = 1  # of a row index (batches.py)


@dataclass(frozen=True)
class Limit:
    """A quantity beside what there is of it."""

    what: str
    needed: float
    there_is: float
    unit: str
    why: str

    @property
    def share(self) -> float:
        return self.needed / self.there_is


def row_bytes(plan: Plan, stage: StageCost) -> float:
    """Of a row that a stage reads, from the plan's tables."""
    rows = count_rows(plan.recipe) or 1
    text = plan.storage["text"] if stage.settings.condition_on == "text" else 0
    return (text + plan.storage[f"latents {stage.settings.resolution}px"]) / rows


def find_limits(plan: Plan, grown: float = 1.0) -> list[Limit]:
    """The tightest first."""
    limits = [*_reading(plan, grown), *_starting(plan, grown), *_encoding(plan, grown),
              *_saving(plan, grown)]  # fmt: skip
    return sorted(limits, key=lambda limit: -limit.share)


def _num_nodes(plan: Plan, grown: float) -> float:
    return max(plan.recipe.train.num_workers * grown / PER_NODE, 1)


def _reading(plan: Plan, grown: float) -> Iterator[Limit]:
    """A window's blocks lie in as many partitions; a node copies those of its ranks' slices, and of
    tables that its disk cannot keep, again for each block."""
    recipe, nodes = plan.recipe, _num_nodes(plan, grown)
    rows = (count_rows(recipe) or 1) * grown
    for stage in plan.stages:
        size = row_bytes(plan, stage)
        pictures = stage.settings.images / stage.cost.seconds * grown
        held = NODE_DISK * _CACHE_SHARE / (rows * size)
        times = 1 if held >= 1 else max(recipe.data.partition_rows / ROW_GROUP_ROWS, 1)
        node = pictures * size * times / nodes
        yield Limit(
            f"{stage.name}: tables read by a node", node / _GB, NODE_NETWORK / _GB, "GB/s",
            f"{pictures:,.0f} pictures/s x {size / 1e3:,.0f} kB x {times:.0f} / {nodes:.0f} nodes",
        )  # fmt: skip
        yield Limit(
            f"{stage.name}: requests to S3", pictures * times / recipe.data.partition_rows * 2,
            _S3_REQUESTS, "GET/s", "a request a partition and table, of one prefix",
        )  # fmt: skip
        yield Limit(
            f"{stage.name}: streams of a node", node / _S3_STREAM, PER_NODE * READ_THREADS,
            "requests", f"{_S3_STREAM / 1e6:.0f} MB/s each; {READ_THREADS} threads a rank",
        )  # fmt: skip


def _starting(plan: Plan, grown: float) -> Iterator[Limit]:
    rows, size = (count_rows(plan.recipe) or 1) * grown, plan.recipe.data.partition_rows
    partitions = rows / size
    scans = len(plan.stages) * 2 * partitions * _ROUND_TRIP / SCAN_THREADS
    training = sum(stage.cost.seconds for stage in plan.stages) / grown
    yield Limit(
        "scans of the tables before stages", scans / 60, _IDLE_SHARE * training / 60, "min",
        f"{len(plan.stages)} x {partitions:,.0f} partitions x 2 tables, {SCAN_THREADS} at a time, "
        f"{_ROUND_TRIP * 1e3:.0f} ms each; of {_IDLE_SHARE:.0%} of the training",
    )  # fmt: skip
    yield Limit(
        "row indices of a node",
        PER_NODE * rows * _ROW_BYTES / _GIB,
        NODE_MEMORY / _GIB,
        "GiB",
        f"{PER_NODE} ranks x {rows:,.0f} rows x {_ROW_BYTES} bytes",
    )


def _encoding(plan: Plan, grown: float) -> Iterator[Limit]:
    """Decoded pictures wait in the object store between readers and encoders."""
    assert plan.encode, "print_traffic refuses"
    settings, nodes = plan.recipe.encode, _num_nodes(plan, grown)
    block = plan.recipe.data.partition_rows * 3 * sum(side * side for side in settings.resolutions)
    under_way = (settings.num_readers + 2 * settings.num_workers) * grown
    pictures = (count_rows(plan.recipe) or 1) * grown / plan.encode.cost.seconds
    yield Limit(
        "encode: object store of a node", under_way * block / nodes / _GIB,
        NODE_MEMORY * _STORE_SHARE / _GIB, "GiB", f"{under_way:,.0f} partitions of "
        f"{block / _GIB:.1f} GiB under way on {nodes:.0f} nodes; beyond, Ray spills to disk",
    )  # fmt: skip
    written = sum(v for k, v in plan.storage.items() if k.startswith(("text", "latents"))) * grown
    yield Limit(
        "encode: tables written by a node",
        written / plan.encode.cost.seconds / nodes / _GB,
        NODE_NETWORK / _GB,
        "GB/s",
        f"{pictures:,.0f} pictures/s",
    )


def _saving(plan: Plan, grown: float) -> Iterator[Limit]:
    """All ranks write their shares at once, in the background."""
    recipe, nodes = plan.recipe, _num_nodes(plan, grown)
    for stage in plan.stages:
        interval = recipe.train.save_every_images / (
            stage.settings.images / stage.cost.seconds * grown
        )
        num_bytes = 16 * stage.parameters
        yield Limit(
            f"{stage.name}: a state of {num_bytes / _GB:.1f} GB", num_bytes / nodes / _S3_STREAM
            / PER_NODE, interval, "s", f"{3600 / interval:.1f} an hour; of a stream a rank",
        )  # fmt: skip


def print_traffic(plan: Plan, grown: float = 10.0) -> str:
    """Both sizes, each with what comes nearest to its limit. Raises PlanError without tables."""
    if not plan.encode:
        raise PlanError("plan.num_images is not set, so that tables are not known; set it", [])
    blocks = []
    for times in (1.0, grown):
        pictures = (count_rows(plan.recipe) or 0) * times
        workers = plan.recipe.train.num_workers * times
        rows = [
            (limit.what, f"{limit.needed:,.3g}", f"{limit.there_is:,.4g}", limit.unit,
             f"{limit.share:.1%}", limit.why)
            for limit in find_limits(plan, times) if limit.share >= _SHOWN_SHARE
        ]  # fmt: skip
        head = f"{pictures:,.0f} pictures, {workers:,.0f} x {plan.machine.name}"
        table = format_table([("what", "needed", "there is", "", "share", ""), *rows])
        blocks.append("\n".join([head, "", *table]))
    return "\n\n".join(blocks)

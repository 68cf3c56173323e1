"""What ``pixart doctor`` finds on this machine: versions, GPUs, memory, disks, limits, ports.

Each check yields findings; none changes anything but a file of its own that it deletes at once.
"""

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pixart_cluster.recipe import FullRecipe
from pixart_jobs.planner import GIB, Plan
from pixart_platform.copies import cache_folder
from pixart_platform.errors import StorageError

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "diffusers", "mlflow", "pyarrow")
_PINS = Path(__file__).parents[2] / "constraints.txt"  # of a checkout
_SHM = Path("/dev/shm")
_MIN_FILES = 4096  # below, Ray itself warns of lost connections; it raises soft limits to 65,536
_RAY_FULL = 0.95  # of its disk used, Ray writes no more objects (local_fs_capacity_threshold)


@dataclass(frozen=True)
class Finding:
    """A check, what was seen, and unless all is well the way out."""

    check: str
    verdict: Literal["ok", "warning", "wrong"]
    seen: str
    remedy: str = ""


def check_versions() -> Iterator[Finding]:
    """Python and the packages that matter most, against what is declared and what is tested.

    Outside a range that the project declares is wrong; another version than the checkout's pin is
    a warning.
    """
    python, wanted = platform.python_version(), metadata("pixart-ray")["Requires-Python"]
    if python not in SpecifierSet(wanted):
        yield Finding("python", "wrong", f"{python}, not {wanted}", "make setup PYTHON=python3.11")
    else:
        yield Finding("python", "ok", python)
    ranges = {r.name: r.specifier for r in map(Requirement, requires("pixart-ray") or ())}
    pins = dict(line.split("==") for line in _lines_of(_PINS) if "==" in line)
    good = []
    for name in PACKAGES:
        pin, found = pins.get(name, ""), ""
        with suppress(PackageNotFoundError):
            found = version(name)
        public = found.partition("+")[0]  # torch's local label says for which CUDA it was built
        remedy = f"pip install '{name}{f'=={pin}' if pin else ranges[name]}'"
        if not found or public not in ranges[name]:
            told = f"{found or 'not installed'}, wanted is {ranges[name]}"
            yield Finding(f"package {name}", "wrong", told, remedy)
        elif pin and public != pin:
            told = f"{found}, tested is {pin}"
            yield Finding(f"package {name}", "warning", told, remedy)
        else:
            good.append(f"{name} {found}")
    yield Finding("packages", "ok", ", ".join(good))


def _lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def gpu_settings(recipe: FullRecipe) -> list[str]:
    """The recipe's settings that ask for GPUs."""
    asked = {
        "train.use_gpu": recipe.train.use_gpu, "train.preview_gpus": recipe.train.preview_gpus,
        "caption.num_gpus": recipe.caption.num_gpus, "encode.num_gpus": recipe.encode.num_gpus,
        "serve.num_gpus": recipe.serve.num_gpus,
    }  # fmt: skip
    return [f"{name} = {value:g}".lower() for name, value in asked.items() if value]


def check_gpus(recipe: FullRecipe, *, elsewhere: bool) -> Iterator[Finding]:
    """What torch sees, whether the driver suits it, NCCL. ``elsewhere``: where a cluster works."""
    import torch

    count, cuda = torch.cuda.device_count(), torch.version.cuda
    asked = gpu_settings(recipe)
    if not count and asked and not elsewhere:
        build = f"for CUDA {cuda}" if cuda else "without CUDA"
        remedy = "nvidia-smi; give a container its GPUs" if cuda else "install torch with CUDA"
        told = f"none that torch (built {build}) sees, and the recipe asks: {', '.join(asked)}"
        yield Finding("gpus", "wrong", told, f"{remedy}, or set these to 0")
        return
    if not count:
        yield Finding("gpus", "ok", "no GPU: CPU only")
        return
    yield Finding("gpus", "ok", ", ".join(torch.cuda.get_device_name(i) for i in range(count)))
    driver = _driver_cuda()
    if driver and cuda and driver < int(cuda.partition(".")[0]):
        told = f"the driver is for CUDA {driver}, torch was built for {cuda}"
        yield Finding("cuda", "wrong", told, "update the driver, or install torch for its CUDA")
    else:
        yield Finding("cuda", "ok", f"torch for {cuda}, driver for {driver or 'unknown'}")
    if recipe.train.use_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        told = "these GPUs have no bf16, which training uses"
        yield Finding("bf16", "wrong", told, "take A100s or newer")
    if torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # torch has no types there
        yield Finding("nccl", "ok", nccl)
    else:
        yield Finding("nccl", "wrong", "torch was built without it", "install torch with CUDA")


def _driver_cuda() -> int:
    """The newest CUDA's major version that the NVIDIA driver runs; 0 if it does not say."""
    import pynvml  # type: ignore[import-untyped]  # has no types

    try:
        pynvml.nvmlInit()
        found: int = pynvml.nvmlSystemGetCudaDriverVersion() // 1000
    except pynvml.NVMLError:
        return 0
    return found


def check_memory(recipe: FullRecipe, plan: Plan, shm: Path = _SHM) -> Iterator[Finding]:
    """Memory for Ray's objects and for the workers of the plan, where it is for this machine."""
    from ray._common.utils import get_system_memory  # what Ray goes by: a container's own limit
    from ray._private import ray_constants as of_ray

    total = get_system_memory()
    store = min(
        total * of_ray.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION,
        of_ray.DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES,
    )
    shared = shutil.disk_usage(shm).total if shm.is_dir() else 0
    if shared < store:
        told = f"{shm} has {shared / GIB:.1f} GiB; Ray wants {store / GIB:.1f}, else uses the disk"
        remedy = f"docker run --shm-size={store / GIB:.0f}g; on Kubernetes an emptyDir of Memory"
        yield Finding("shared memory", "warning", told, remedy)
    else:
        yield Finding("shared memory", "ok", f"{shm} has {shared / GIB:.1f} GiB")
    yield Finding("object store", "ok", f"{store / GIB:.1f} GiB, unless Ray is told another size")
    told = f"{total / GIB:.1f} GiB"
    if plan.machine.on_gpu:
        yield Finding("memory", "ok", told)
        return
    zero = recipe.train.zero_stage
    need = recipe.train.num_workers * max(stage.memory[zero] for stage in plan.stages)
    told += f"; {recipe.train.num_workers} workers need {need / GIB:.1f} by the plan"
    if need > total:
        yield Finding(
            "memory", "wrong", told, "pixart plan RECIPE, with a smaller micro_batch_images"
        )
    else:
        yield Finding("memory", "ok", told)


def local_needs(recipe: FullRecipe, plan: Plan, root: Path) -> Mapping[Path, float]:
    """Bytes that the plan writes to each folder of this machine."""
    needs: dict[Path, float] = {}
    for what, num_bytes in plan.storage.items():
        kept = what == "states and snapshots"
        place = recipe.train.states if kept else recipe.data.store
        if not place.startswith("s3://"):
            folder = Path(place) if place else root
            needs[folder] = needs.get(folder, 0) + num_bytes
    return needs or {root: 0}


def check_disks(recipe: FullRecipe, plan: Plan, root: Path) -> Iterator[Finding]:
    """Whether what the plan forecasts fits, and folders can be written."""
    for folder, need in local_needs(recipe, plan, root).items():
        yield _check_folder(f"disk {folder}", folder, need, "--root or data.store on a larger disk")
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield _check_folder(
        f"disk {temporary}", temporary, 0, "delete old files there, or set RAY_TMPDIR"
    )
    try:
        cache = cache_folder()
    except StorageError as error:
        yield Finding("disk PIXART_CACHE", "wrong", str(error), "export PIXART_CACHE=FOLDER")
        return
    remedy = "export PIXART_CACHE=FOLDER on a larger disk"
    finding = _check_folder("disk PIXART_CACHE", cache, 0, remedy)
    tables = sum(size for name, size in plan.storage.items() if name != "states and snapshots")
    spare = shutil.disk_usage(cache).free / 2
    if finding.verdict == "ok" and recipe.data.store.startswith("s3://") and tables > spare:
        told = f"{cache} may hold {spare / GIB:.1f} GiB of the tables' {tables / GIB:.1f}"
        finding = Finding(finding.check, "warning", f"{told}; the rest is fetched again", remedy)
    yield finding


def _check_folder(check: str, folder: Path, need: float, remedy: str) -> Finding:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".pixart-doctor-") as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        return Finding(check, "wrong", f"{there} cannot be written ({error.strerror})", remedy)
    disk = shutil.disk_usage(there)
    told = f"{disk.free / GIB:.1f} GiB free" + (
        f"; the plan writes {need / GIB:.1f}" if need else ""
    )
    if disk.free < need:
        return Finding(check, "wrong", told, remedy)
    if disk.total and 1 - disk.free / disk.total > _RAY_FULL:
        told += f", {1 - disk.free / disk.total:.0%} used; Ray stops writing at {_RAY_FULL:.0%}"
        return Finding(check, "wrong", told, remedy)
    return Finding(check, "ok", told)


def check_files() -> Iterator[Finding]:
    """The limit of open files, as far as Ray may raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{soft:,} (may be raised to {hard:,})"
    if 0 <= hard < _MIN_FILES:
        remedy = "ulimit -n 65536, or nofile in /etc/security/limits.conf; docker --ulimit nofile"
        yield Finding("open files", "wrong", told, remedy)
    else:
        yield Finding("open files", "ok", told)


def check_ports(ports: Mapping[str, int]) -> Iterator[Finding]:
    """Whether each port of 127.0.0.1 is free; ``ports`` says what for."""
    for what, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                told = f"{port}, {what}: {_holder(port) or error.strerror}"
                remedy = "well if that is ours; else stop it, or choose another port"
                yield Finding(f"port {port}", "warning", told, remedy)
            else:
                yield Finding(f"port {port}", "ok", f"free for {what}")


def _holder(port: int) -> str:
    """Who listens there, if we may know."""
    with suppress(psutil.Error):
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr[1:] == (port,) and found.pid:
                return f"taken by {psutil.Process(found.pid).name()}, pid {found.pid}"
    return ""

"""The plan of a recipe: against what was published and measured, and against its own advice."""

import sys
from pathlib import Path
from typing import Any

import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_cluster import cli
from pixart_cluster.recipe import FullRecipe, read_recipe
from pixart_jobs.plan_sheet import print_plan
from pixart_jobs.planner import (
    GIB,
    RUNTIME_BYTES,
    Machine,
    PlanError,
    change,
    find_excess,
    fitting_batch,
    make_plan,
    memory_of,
)
from pixart_jobs.traffic import find_limits, print_traffic
from pixart_models.forecast import LIBRARIES, step_memory
from pixart_platform.accounting import ACCELERATORS
from pixart_platform.errors import RecipeError

PAPER = read_recipe("pixart-alpha")
MICRO = read_recipe("pixart-micro")
DIGITS = read_recipe("digits")
DEMO_SECONDS = {  # on two cores under some load; the last for 25,600 images
    "pixels": 48.2, "align": 153.0, "aesthetics": 94.1 * 32_000 / 25_600,
}  # fmt: skip


def days(recipe: FullRecipe, mfu: float | None = None) -> dict[str, float]:
    return {stage.name: stage.gpu_hours / 24 for stage in make_plan(recipe, mfu=mfu).stages}


def test_the_papers_stages_take_what_it_published() -> None:
    published = PAPER.plan.published_gpu_days
    assert sum(published.values()) == pytest.approx(753, rel=1e-3)
    assert days(PAPER) == pytest.approx(published, rel=0.2)


def test_one_share_of_the_peak_forecasts_three_of_its_stages_and_the_sum() -> None:
    """The share is of the 256 px stages together; 512 and 1024 px contradict each other."""
    published, found = PAPER.plan.published_gpu_days, days(PAPER, mfu=0.246)
    assert sum(found.values()) == pytest.approx(753, rel=0.01)
    for name in ("pixels", "align", "aesthetics_256"):
        assert found[name] == pytest.approx(published[name], rel=0.11)
    assert found["aesthetics_512"] / published["aesthetics_512"] == pytest.approx(1.31, abs=0.02)
    assert found["aesthetics_1024"] / published["aesthetics_1024"] == pytest.approx(0.33, abs=0.02)


def test_the_paper_costs_what_it_published() -> None:
    plan = make_plan(PAPER)
    assert sum(stage.cost.usd for stage in plan.stages) == pytest.approx(28_400, rel=0.01)
    sizes = [stage.parameters for stage in plan.stages]
    assert sizes == [674_834_720, *[610_856_096] * 3, 611_349_152]  # the last is told sizes


def test_the_demos_stages_take_what_they_took() -> None:
    found = {stage.name: stage.cost.seconds for stage in make_plan(DIGITS).stages}
    assert found == pytest.approx(DEMO_SECONDS, rel=0.25)


def test_micro_costs_a_sixteenth_of_the_paper() -> None:
    plan = make_plan(MICRO, "h100-80g")
    assert sum(stage.cost.usd for stage in plan.stages) < 28_400 / 16


@pytest.mark.parametrize(
    ("stage", "steps"),
    [("pixels", 300_000), ("align", 150_000), ("aesthetics_256", 90_000),
     ("aesthetics_512", 100_000), ("aesthetics_1024", 16_000)],
)  # fmt: skip
def test_the_papers_recipe_has_its_steps(stage: str, steps: int) -> None:
    settings = PAPER.stages[stage]
    assert divmod(settings.images, settings.batch_images) == (steps, 0)


@repeatable
@given(
    fewer=st.sampled_from([8, 16, 32]), zero=st.integers(1, 3), recompute=st.booleans(),
    kind=st.sampled_from(["h200", "a100-80g"]),
)  # fmt: skip
def test_more_gpus_are_faster_and_higher_zero_is_smaller(
    fewer: int, zero: int, recompute: bool, kind: str
) -> None:
    machine = Machine(kind, ACCELERATORS[kind])
    changes = {"train.recompute_blocks": recompute, "train.zero_stage": zero}
    few = change(PAPER, changes | {"train.num_workers": fewer})
    many = change(few, {"train.num_workers": 2 * fewer})
    for name, stage in PAPER.stages.items():
        micro_batch = stage.batch_images // fewer
        memory = memory_of(few, machine, name)
        by_zero = [memory.peak(micro_batch, z, fewer) for z in range(4)]
        assert by_zero == sorted(by_zero, reverse=True)
        halved = memory_of(many, machine, name).peak(micro_batch // 2, zero, 2 * fewer)
        assert halved <= by_zero[zero]
    if not find_excess(few, machine):
        slow, fast = make_plan(few, kind).stages, make_plan(many, kind).stages
        for a, b in zip(slow, fast, strict=True):
            assert b.cost.seconds < a.cost.seconds
            assert b.flops == a.flops


@repeatable
@given(
    micro_batch=st.integers(1, 400), workers=st.sampled_from([1, 2, 6, 16]),
    zero=st.integers(1, 3), kind=st.sampled_from(["a10g", "l4", "a100-40g", "h100-80g"]),
    recompute=st.booleans(), stage=st.sampled_from(["align", "aesthetics_512"]),
)  # fmt: skip
def test_advice_makes_the_plan_fit(
    micro_batch: int, workers: int, zero: int, kind: str, recompute: bool, stage: str
) -> None:
    recipe = change(
        PAPER.model_copy(update={"stages": {"only": PAPER.stages[stage]}}),
        {
            "stages.only.start_from": "scratch", "stages.only.batch_images": micro_batch * workers,
            "train.num_workers": workers, "train.zero_stage": zero,
            "train.recompute_blocks": recompute, "plan.published_gpu_days": {},
        },
    )  # fmt: skip
    machine, has = Machine(kind, ACCELERATORS[kind]), ACCELERATORS[kind].memory_gib * GIB
    most, memory = fitting_batch(recipe, machine, "only"), memory_of(recipe, machine, "only")
    if most == micro_batch:
        assert make_plan(recipe, kind).stages[0].memory[zero] <= has
        return
    assert memory.peak(most + 1, zero, workers) > has
    with pytest.raises(PlanError, match=f"{micro_batch} images of only on each {kind}") as caught:
        make_plan(recipe, kind)
    assert caught.value.ways or not most
    for way in caught.value.ways:
        assert make_plan(change(recipe, way), kind).stages
        for path, value in way.items():
            assert f"--set {path}={str(value).lower()}" in str(caught.value)


def test_memory_is_the_measured_formulas() -> None:
    """One worker on a CPU, and the average and a state that is being saved beside its weights."""
    machine = Machine("cpu", ACCELERATORS["cpu"])
    for name in DIGITS.stages:
        memory = memory_of(DIGITS, machine, name)
        stage = make_plan(DIGITS).stages[list(DIGITS.stages).index(name)]
        text = 48 if name != "pixels" else 0
        side = stage.network.sample_size
        for batch in (1, 32, 500):
            told = step_memory(stage.network, batch, side, side, text, ema_copies=1).total
            found = memory.peak(batch, 0, 1) - RUNTIME_BYTES[False] + LIBRARIES
            found -= 32 * memory.parameters
            assert found == pytest.approx(told, rel=1e-3)


def test_leaving_tokens_out_saves_time_and_no_memory_before_the_finish() -> None:
    whole = change(MICRO, {f"stages.{name}.token_drop": None for name in MICRO.stages})
    dropped, full = make_plan(MICRO, "h100-80g").stages, make_plan(whole, "h100-80g").stages
    for a, b in zip(dropped, full, strict=True):
        assert a.flops < 0.5 * b.flops
        assert a.memory == b.memory
    ever = change(MICRO, {f"stages.{name}.token_drop.finish_share": 0 for name in MICRO.stages})
    for a, b in zip(make_plan(ever, "h100-80g").stages, dropped, strict=True):
        assert a.flops < b.flops
        assert a.memory < b.memory


def test_tables_and_checkpoints_take_their_room() -> None:
    storage = make_plan(DIGITS).storage
    assert storage["latents 32px"] == 6144 * 2 * 16 * 8 * 8  # moments of 8 channels in fp16
    assert storage["text"] == pytest.approx(6144 * 12.3 * 64 * 2)
    unknown = make_plan(change(PAPER, {"plan.num_images": None}))
    assert unknown.encode is None
    assert list(unknown.storage) == ["states and snapshots"]
    copied = change(PAPER, {"data.copy_bytes": True, "plan.image_bytes": 1000})
    assert make_plan(copied).storage["images"] == 25e9


def test_the_sheet_adds_up_and_says_what_was_assumed() -> None:
    sheet = print_plan(make_plan(PAPER))
    rows = {line.split()[0]: line.split() for line in sheet.splitlines() if line.split()}
    hours = {name: float(rows[name][1].replace(",", "")) for name in (*PAPER.stages, "encode")}
    assert float(rows["training"][1]) == pytest.approx(sum(hours.values()) - hours["encode"], 1e-3)
    totals = [line.split()[1] for line in sheet.splitlines() if line.strip().startswith("total")]
    assert [float(total.replace(",", "")) for total in totals] == [
        pytest.approx(sum(hours.values()), 1e-3),
        pytest.approx(sum(make_plan(PAPER).storage.values()) / 1e9, 1e-6),
    ]
    for said in ("MFU", "24.6% at 256 px", "120 tokens", "forward once more", "753 A100-days",
                 "not counted", "0.369 kg CO2", "ZeRO 3", "TF32"):  # fmt: skip
        assert said in sheet, said
    assert "+10%" in rows["pixels"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pixart-alpha", "--gpu", "l4", "--set", "train.recompute_blocks=false"],
         "Any one of these will do: --set train.recompute_blocks=true |"),
        (["pixart-alpha", "--nodes", "49"], "less than an image for each of train.num_workers"),
        (["digits", "--gpu", "tpu"], "accelerator 'tpu' is unknown; one of a100-40g,"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Any, says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pixart", "plan", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert says in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_the_command_prints_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["pixart", "plan", "pixart-alpha", "--nodes", "16", "--gpu", "h200"]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "pixart-alpha on 128 x h200" in capsys.readouterr().out


def test_an_accelerator_of_ones_own() -> None:
    described = {"tflops": 2250, "memory_gib": 180, "watts": 1500, "usd_per_hour": 4, "mfu": 0.25}
    recipe = change(PAPER, {"accounting.accelerators": {"b200": described}})
    assert make_plan(recipe, "b200").machine.kind.memory_gib == 180
    with pytest.raises(RecipeError, match="describe it under accounting"):
        make_plan(PAPER, "b200")


def test_the_page_on_scale_says_what_the_plan_says_now() -> None:
    page = (Path(__file__).parents[1] / "cluster" / "scale.md").read_text()
    assert f"```text\n{print_traffic(make_plan(PAPER))}\n```" in page


def test_what_grows_with_the_pictures_breaks_and_what_is_a_nodes_own_does_not() -> None:
    plan = make_plan(PAPER)
    small, large = ({x.what: x.share for x in find_limits(plan, n)} for n in (1, 10))
    assert max(small.values()) < 1
    assert [what for what, share in large.items() if share > 1] == [
        "scans of the tables before stages"
    ]
    assert large["encode: object store of a node"] == pytest.approx(
        small["encode: object store of a node"]
    )


def test_tables_that_a_disk_keeps_are_read_once() -> None:
    for recipe, times in ((change(PAPER, {"plan.num_images": 1_000_000}), 1), (PAPER, 2)):
        whys = {limit.what: limit.why for limit in find_limits(make_plan(recipe))}
        assert f"kB x {times} /" in whys["align: tables read by a node"]


def test_a_plan_without_tables_has_no_traffic() -> None:
    with pytest.raises(PlanError, match=r"plan\.num_images"):
        print_traffic(make_plan(change(PAPER, {"plan.num_images": None})))

"""Solver tables against diffusers' schedulers, row by row and in mixed batches."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixart_models.config import ModelInputError
from pixart_models.diffusion import ObjectiveName
from pixart_models.solvers import (
    LCM_GRID,
    MAX_STEPS,
    SOLVERS,
    SolverName,
    build_schedule,
    guide,
    need_noise,
    solver_step,
)

# diffusers converts a tensor with numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EVERY: list[tuple[ObjectiveName, SolverName]] = [
    (objective, solver) for objective, solvers in SOLVERS.items() for solver in solvers
]
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
SHAPE = (2, 3, 3)


def network(x: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth stand-in of B rows that depends on the place, the value and the timestep (B,)."""
    t = (timesteps / 1000).view(-1, 1, 1, 1).to(x)
    place = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(SHAPE)
    return torch.tanh(0.8 * x + place) * (0.4 + t) - 0.3 * t * x


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def build_diffusers_scheduler(objective: ObjectiveName, solver: SolverName, steps: int) -> Any:
    """The scheduler that a row must equal, at its first step."""
    import diffusers

    scheduler: Any
    if objective == "flow" and solver != "dpm++2m":
        kind, grid = ("EulerDiscrete", steps) if solver == "euler" else ("LCM", LCM_GRID)
        scheduler = getattr(diffusers, f"FlowMatch{kind}Scheduler")()
        left = [grid - i * grid // steps for i in range(steps)]
        scheduler.set_timesteps(sigmas=[0.999 * n / grid for n in left])
    elif solver == "lcm":
        scheduler = diffusers.LCMScheduler(**LINEAR, original_inference_steps=50)
        scheduler.set_timesteps(steps)
    else:  # DDIM is DPM-Solver++ of the first order, which follows its own timesteps exactly
        process = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **(LINEAR if objective == "iddpm" else process),
            solver_order=2 if solver == "dpm++2m" else 1, final_sigmas_type="zero",
            timestep_spacing="linspace", lower_order_final=True, euler_at_final=True,
        )  # fmt: skip
        if solver == "ddim":
            told = build_schedule(objective, steps, solver).timesteps
            scheduler.set_timesteps(timesteps=told.long().tolist())
        else:
            scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def walk(scheduler: Any, told: Tensor, seed: int) -> list[Tensor]:
    """Each x after a step. The network sees our timesteps: diffusers' flow-matching schedulers,
    which no exported pipeline has, tell it fractions."""
    x, path = noise(seed), []
    for step, (theirs, ours) in enumerate(zip(scheduler.timesteps, told, strict=True)):
        output = network(x[None], ours[None])
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = scheduler.step(output, theirs, x[None], generator=generator).prev_sample[0]
        path.append(x)
    return path


def solve_with_diffusers(
    objective: ObjectiveName, solver: SolverName, steps: int, seed: int
) -> list[Tensor]:
    told = build_schedule(objective, steps, solver).timesteps
    return walk(build_diffusers_scheduler(objective, solver, steps), told, seed)


def again(seed: int, step: int) -> Tensor:
    """The noise of one row at one step, as ``walk`` gives it to diffusers."""
    return noise(1000 * seed + step)


def solve(objective: ObjectiveName, solver: SolverName, steps: int, seed: int) -> list[Tensor]:
    schedule = build_schedule(objective, steps, solver)
    rows, x0 = noise(seed)[None], torch.zeros(1, *SHAPE)
    path = []
    for step, (timestep, line) in enumerate(zip(schedule.timesteps, schedule.table, strict=True)):
        output = network(rows, timestep[None])
        rows, x0 = solver_step(rows, output, x0, line[None], again(seed, step)[None])
        path.append(rows[0])
    return path


def assert_same_path(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for x, expected in zip(ours, theirs, strict=True):
        assert (x - expected).abs().max() < 1e-5 * expected.abs().max()


_ROW = st.tuples(st.sampled_from(EVERY), st.integers(1, LCM_GRID), st.integers(0, 2**20))


@settings(max_examples=40)
@given(row=_ROW)
def test_every_step_equals_diffusers(
    row: tuple[tuple[ObjectiveName, SolverName], int, int],
) -> None:
    (objective, solver), steps, seed = row
    theirs = solve_with_diffusers(objective, solver, steps, seed)
    assert_same_path(solve(objective, solver, steps, seed), theirs)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100])
def test_ddim_is_diffusers_where_that_steps_to_its_own_next_timestep(steps: int) -> None:
    """DDIMScheduler goes to t - 1000 // steps: its next timestep only if steps divide 1000."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    told = build_schedule("iddpm", steps, "ddim").timesteps
    assert scheduler.timesteps.tolist() == told.tolist()
    assert_same_path(solve("iddpm", "ddim", steps, 1), walk(scheduler, told, 1))


@settings(max_examples=60)
@given(row=st.sampled_from(EVERY), steps=st.integers(1, MAX_STEPS))
def test_timesteps_are_diffusers(row: tuple[ObjectiveName, SolverName], steps: int) -> None:
    objective, solver = row
    steps = min(steps, LCM_GRID) if solver == "lcm" else steps
    ours = build_schedule(objective, steps, solver).timesteps
    theirs = build_diffusers_scheduler(objective, solver, steps).timesteps
    flow_matching = objective == "flow" and solver != "dpm++2m"  # told in fractions
    assert torch.equal(ours, theirs.float()) or flow_matching
    assert ((ours - theirs).abs() < 1.001).all()


@pytest.mark.parametrize("solver", ["dpm++2m", "euler"])
def test_flows_whole_timesteps_are_the_exported_pipelines_at_every_step_count(
    solver: SolverName,
) -> None:
    """A plain floor of 999 left / steps differs in 1715 of the 500500."""
    scheduler = build_diffusers_scheduler("flow", "dpm++2m", 1)
    for steps in range(1, MAX_STEPS + 1):
        scheduler.set_timesteps(steps)
        ours = build_schedule("flow", steps, solver)
        assert torch.equal(ours.timesteps, scheduler.timesteps.float()), steps
        torch.testing.assert_close(-ours.table[:, 1], scheduler.sigmas[:-1], rtol=1e-6, atol=0)


@settings(max_examples=25)
@given(
    objective=st.sampled_from(list(SOLVERS)),
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(0, 6)), min_size=2, max_size=5
    ),
)
def test_rows_of_any_solver_schedule_and_step_share_an_update(
    objective: ObjectiveName, rows: list[tuple[int, int, int]]
) -> None:
    """Row i starts ``delay`` rounds late, so one update holds rows at different steps."""
    solvers = [SOLVERS[objective][choice] for choice, _, _ in rows]
    x = torch.stack([noise(seed) for seed in range(len(rows))])
    x0 = torch.full_like(x, 7.0)  # a row's first step must ignore it
    schedules = [
        build_schedule(objective, steps, solver)
        for solver, (_, steps, _) in zip(solvers, rows, strict=True)
    ]
    for now in range(max(steps + delay for _, steps, delay in rows)):
        at = [(i, now - delay) for i, (_, n, delay) in enumerate(rows) if 0 <= now - delay < n]
        if not at:
            continue
        active = [i for i, _ in at]
        timesteps = torch.stack([schedules[i].timesteps[step] for i, step in at])
        lines = torch.stack([schedules[i].table[step] for i, step in at])
        output = network(x[active], timesteps)
        fresh = torch.stack([again(i, step) for i, step in at]) if need_noise(lines) else None
        x[active], x0[active] = solver_step(x[active], output, x0[active], lines, fresh)
    for i, (_, steps, _) in enumerate(rows):
        assert_same_path([x[i]], solve_with_diffusers(objective, solvers[i], steps, i)[-1:])


def test_euler_on_flow_is_the_explicit_euler_method() -> None:
    sigmas = torch.linspace(0.999, 0, 8)
    expected = noise(0)
    for sigma, following in pairwise(sigmas):
        velocity = network(expected[None], (1000 * sigma[None]).floor())[0]
        expected = expected + (following - sigma) * velocity
    torch.testing.assert_close(solve("flow", "euler", 7, 0)[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("objective", "solver"), EVERY)
def test_a_network_that_knows_the_picture_is_followed_to_it(
    objective: ObjectiveName, solver: SolverName
) -> None:
    """With x0 known the exact output at every step leads to x0, and x is on the path on the way."""
    x0, e = noise(1)[None].double(), noise(0)[None].double()
    schedule = build_schedule(objective, 6, solver)
    x, before = None, torch.zeros_like(x0)
    for line in schedule.table.double():
        p, q = line[0], line[1]
        if x is None:  # x0 = p x + q out, with out = e - x0 or e
            x = (x0 - q * (e - x0 if objective == "flow" else e)) / p
        x, before = solver_step(x, (x0 - p * x) / q, before, line[None], e)
        torch.testing.assert_close(before, x0, rtol=0, atol=1e-9)
    assert x is not None
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)


def test_second_order_beats_first_order() -> None:
    exact = solve("flow", "euler", 1000, 0)[-1]
    first, second = (
        (solve("flow", solver, 12, 0)[-1] - exact).abs().max() for solver in SOLVERS["flow"][1::-1]
    )
    assert second < 0.5 * first


@pytest.mark.parametrize(
    ("solver", "steps", "limit"),
    [("dpm++2m", -1, 1000), ("euler", 0, 1000), ("dpm++2m", 1001, 1000), ("lcm", 51, 50)],
)
def test_steps_out_of_range_name_the_value_and_the_range(
    solver: SolverName, steps: int, limit: int
) -> None:
    with pytest.raises(
        ModelInputError, match=rf"num_inference_steps = {steps}: must be 1 to {limit} with "
    ):
        build_schedule("flow", steps, solver)


@pytest.mark.parametrize(("objective", "solver"), [("flow", "ddim"), ("iddpm", "euler")])
def test_a_solver_of_the_other_objective_is_refused_naming_the_right_ones(
    objective: ObjectiveName, solver: SolverName
) -> None:
    with pytest.raises(ModelInputError, match=rf"solver = '{solver}': must be one of dpm\+\+2m, "):
        build_schedule(objective, 4, solver)


@pytest.mark.parametrize(("objective", "solver"), EVERY)
def test_every_allowed_step_count_has_finite_coefficients(
    objective: ObjectiveName, solver: SolverName
) -> None:
    most = LCM_GRID if solver == "lcm" else MAX_STEPS
    for steps in (1, 2, most - 1, most):
        schedule = build_schedule(objective, steps, solver)
        assert schedule.num_steps == steps
        assert torch.isfinite(schedule.table).all()
        assert (schedule.timesteps.diff() <= 0).all()
        assert schedule.table[-1, 2] == 0, "the last step ends on the clean latent"
        assert schedule.table[-1, 5] == 0, "and is never noised"


def test_only_lcm_is_noised_again_and_cannot_go_without() -> None:
    lines = torch.stack([build_schedule("flow", 3, s).table[0] for s in SOLVERS["flow"]])
    assert need_noise(lines) == [2]
    x = torch.zeros(3, *SHAPE)
    with pytest.raises(AssertionError, match="need noise"):
        solver_step(x, x, x, lines)
    moved, _ = solver_step(x, x, x, lines, torch.ones_like(x))
    assert [bool(row.any()) for row in moved] == [False, False, True]


def test_a_step_never_waits_for_the_device() -> None:
    """Reading a tensor of the meta device raises, as reading one of a GPU would wait."""
    lines = torch.stack([build_schedule("flow", 3, s).table[0] for s in SOLVERS["flow"]])
    x = torch.empty(3, *SHAPE, device="meta")
    moved, x0 = solver_step(x, x, x, lines, x)
    guided = guide(moved, x0, torch.empty(3, device="meta"))
    assert guided.shape == x.shape


def test_guidance_extrapolates_by_each_rows_scale() -> None:
    conditional, unconditional = torch.ones(3, *SHAPE), torch.full((3, *SHAPE), 0.5)
    mixed = guide(conditional, unconditional, torch.tensor([0.0, 1.0, 4.0]))
    assert mixed[:, 0, 0, 0].tolist() == [0.5, 1.0, 2.5]

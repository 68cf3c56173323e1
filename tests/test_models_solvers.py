"""Solver tables against diffusers' schedulers, row by row and in mixed batches."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixart_models.diffusion import ObjectiveName
from pixart_models.solvers import MAX_STEPS, SolverName, build_schedule, guide, solver_step

# diffusers converts a tensor with numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

OBJECTIVES: tuple[ObjectiveName, ...] = ("flow", "iddpm")
SOLVERS: tuple[SolverName, ...] = ("dpm++2m", "euler")
EVERY = list(product(OBJECTIVES, SOLVERS))
STEPS = (1, 2, 3, 5, 14, 20)
SHAPE = (2, 3, 3)


def network(x: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth stand-in of B rows that depends on the place, the value and the timestep (B,)."""
    t = (timesteps / 1000).view(-1, 1, 1, 1).to(x)
    place = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(SHAPE)
    return torch.tanh(0.8 * x + place) * (0.4 + t) - 0.3 * t * x


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def build_diffusers_scheduler(objective: ObjectiveName, solver: SolverName, steps: int) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    process = (
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if objective == "flow"
        else {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
    )
    scheduler: Any = DPMSolverMultistepScheduler(
        **process, solver_order=2 if solver == "dpm++2m" else 1, final_sigmas_type="zero",
        timestep_spacing="linspace", lower_order_final=True, euler_at_final=True,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


def solve_with_diffusers(
    objective: ObjectiveName, solver: SolverName, steps: int, x: Tensor
) -> list[Tensor]:
    """Each x after a step. The network sees our timesteps: diffusers truncates flow's to ints."""
    scheduler = build_diffusers_scheduler(objective, solver, steps)
    told = build_schedule(objective, steps, solver).timesteps
    path = []
    for theirs, ours in zip(scheduler.timesteps, told, strict=True):
        x = scheduler.step(network(x[None], ours[None]), theirs, x[None]).prev_sample[0]
        path.append(x)
    return path


def solve(objective: ObjectiveName, solver: SolverName, steps: int, x: Tensor) -> list[Tensor]:
    schedule = build_schedule(objective, steps, solver)
    rows, x0 = x[None], torch.zeros(1, *SHAPE)
    path = []
    for timestep, line in zip(schedule.timesteps, schedule.table, strict=True):
        rows, x0 = solver_step(rows, network(rows, timestep[None]), x0, line[None])
        path.append(rows[0])
    return path


@pytest.mark.parametrize(("objective", "solver"), EVERY)
def test_every_step_equals_diffusers(objective: ObjectiveName, solver: SolverName) -> None:
    for steps, seed in product(STEPS, (0, 1)):
        ours = solve(objective, solver, steps, noise(seed))
        theirs = solve_with_diffusers(objective, solver, steps, noise(seed))
        for x, expected in zip(ours, theirs, strict=True):
            error = (x - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, (steps, seed)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_timesteps_are_diffusers_before_it_truncates_them(objective: ObjectiveName) -> None:
    for steps in STEPS:
        ours = build_schedule(objective, steps).timesteps
        theirs = build_diffusers_scheduler(objective, "dpm++2m", steps).timesteps
        assert ((ours - theirs).abs() < 1.001).all(), steps
        assert objective == "flow" or torch.equal(ours, theirs.float())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    objective=st.sampled_from(OBJECTIVES),
    rows=st.lists(
        st.tuples(st.sampled_from(SOLVERS), st.integers(1, 9), st.integers(0, 5)),
        min_size=1,
        max_size=5,
    ),
)
def test_rows_of_any_schedule_and_step_share_an_update(
    objective: ObjectiveName, rows: list[tuple[SolverName, int, int]]
) -> None:
    """Row i starts ``delay`` rounds late, so one update holds rows at different steps."""
    x = torch.stack([noise(seed) for seed in range(len(rows))])
    x0 = torch.full_like(x, 7.0)  # a row's first step must ignore it
    schedules = [build_schedule(objective, steps, solver) for solver, steps, _ in rows]
    for now in range(max(steps + delay for _, steps, delay in rows)):
        at = [(i, now - delay) for i, (_, n, delay) in enumerate(rows) if 0 <= now - delay < n]
        if not at:
            continue
        active = [i for i, _ in at]
        timesteps = torch.stack([schedules[i].timesteps[step] for i, step in at])
        lines = torch.stack([schedules[i].table[step] for i, step in at])
        output = network(x[active], timesteps)
        x[active], x0[active] = solver_step(x[active], output, x0[active], lines)
    for i, (solver, steps, _) in enumerate(rows):
        alone = solve(objective, solver, steps, noise(i))[-1]
        torch.testing.assert_close(x[i], alone, rtol=1e-5, atol=1e-5)


def test_euler_on_flow_is_the_explicit_euler_method() -> None:
    x = noise(0)
    sigmas = torch.linspace(0.999, 0, 8)
    expected = x
    for sigma, following in pairwise(sigmas):
        velocity = network(expected[None], 1000 * sigma[None])[0]
        expected = expected + (following - sigma) * velocity
    torch.testing.assert_close(solve("flow", "euler", 7, x)[-1], expected, rtol=1e-5, atol=1e-5)


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
        x, before = solver_step(x, (x0 - p * x) / q, before, line[None])
        torch.testing.assert_close(before, x0, rtol=0, atol=1e-9)
    assert x is not None
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)


def test_second_order_beats_first_order() -> None:
    exact = solve("flow", "euler", 1000, noise(0))[-1]
    errors = {s: (solve("flow", s, 12, noise(0))[-1] - exact).abs().max() for s in SOLVERS}
    assert errors["dpm++2m"] < 0.5 * errors["euler"]


@pytest.mark.parametrize("steps", [-1, 0, MAX_STEPS + 1])
def test_steps_out_of_range_name_the_value_and_the_range(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_inference_steps = {steps}: must be 1 to 1000"):
        build_schedule("flow", steps)


@pytest.mark.parametrize(("objective", "solver"), EVERY)
def test_every_allowed_step_count_has_finite_coefficients(
    objective: ObjectiveName, solver: SolverName
) -> None:
    for steps in (1, 2, 999, MAX_STEPS):
        schedule = build_schedule(objective, steps, solver)
        assert schedule.num_steps == steps
        assert torch.isfinite(schedule.table).all()
        assert (schedule.timesteps.diff() <= 0).all()
        assert schedule.table[-1, 2] == 0, "the last step ends on the clean latent"


def test_guidance_extrapolates_by_each_rows_scale() -> None:
    conditional, unconditional = torch.ones(3, *SHAPE), torch.full((3, *SHAPE), 0.5)
    mixed = guide(conditional, unconditional, torch.tensor([0.0, 1.0, 4.0]))
    assert mixed[:, 0, 0, 0].tolist() == [0.5, 1.0, 2.5]

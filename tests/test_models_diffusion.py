"""Objectives against their definitions: torch.distributions, Bayes' rule and diffusers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributions

from pixart_models.config import ModelInputError
from pixart_models.diffusion import (
    IDDPM,
    MIN_SNR_GAMMA,
    NUM_TIMESTEPS,
    Objective,
    ObjectiveName,
    RectifiedFlow,
    get_objective,
)

BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
SURVIVING = (1 - BETAS).cumprod(0)
TIMESTEPS = [1, 2, 17, 250, 500, 998, 999]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def noised(timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, noise, x_t) for IDDPM at ``timesteps`` (B,), in float64."""
    x0, noise = draw(len(timesteps), 2, 4, 4).clamp(-1, 1), draw(len(timesteps), 2, 4, 4, seed=1)
    return x0, noise, IDDPM().add_noise(x0, noise, timesteps)


def test_flow_runs_straight_from_data_to_noise_in_each_row() -> None:
    x0, noise = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    x_t = RectifiedFlow().add_noise(x0, noise, torch.tensor([0.0, 250.0, 1000.0]))
    expected = torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]])
    torch.testing.assert_close(x_t, expected)


@settings(deadline=None, derandomize=True)
@given(
    location=st.floats(-2, 2),
    spread=st.floats(0.2, 2),
    uniform=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5),
)
def test_flow_timesteps_are_the_logit_normals_quantiles(
    location: float, spread: float, uniform: list[float]
) -> None:
    quantiles = torch.tensor(uniform, dtype=torch.float64)
    expected = torch.sigmoid(location + spread * torch.special.ndtri(quantiles))
    ours = RectifiedFlow(location, spread).sample_timesteps(quantiles)
    torch.testing.assert_close(ours, NUM_TIMESTEPS * expected)


def test_flow_timesteps_stay_inside_at_the_ends() -> None:
    ends = RectifiedFlow().sample_timesteps(torch.tensor([0.0, 0.5, 1.0]))
    assert 0 < ends[0] < 10
    assert ends[1].item() == pytest.approx(500)
    assert 990 < ends[2] < 1000


def test_flow_loss_is_zero_for_the_velocity_and_the_mean_square_otherwise() -> None:
    flow, timesteps = RectifiedFlow(), torch.tensor([1.0, 999.0])
    x0, noise = draw(2, 2, 4, 4), draw(2, 2, 4, 4, seed=1)
    x_t = flow.add_noise(x0, noise, timesteps)
    velocity = noise - x0
    assert torch.equal(flow.loss(velocity, x0, noise, x_t, timesteps), torch.zeros(2).double())
    off = velocity + torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    loss = flow.loss(off, x0, noise, x_t, timesteps)
    torch.testing.assert_close(loss, torch.tensor([0.25, 4.0]).double())


def test_flow_velocity_is_the_paths_derivative() -> None:
    flow, x0, noise = RectifiedFlow(), draw(1, 2, 4, 4), draw(1, 2, 4, 4, seed=1)
    late = flow.add_noise(x0, noise, torch.tensor([501.0]).double())
    early = flow.add_noise(x0, noise, torch.tensor([499.0]).double())
    torch.testing.assert_close((late - early) / 0.002, noise - x0)


def test_iddpm_noises_as_diffusers_does() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    reference = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)
    timesteps = torch.tensor([0, 1, 250, 500, 999])
    x0, noise = draw(5, 2, 4, 4).float(), draw(5, 2, 4, 4, seed=1).float()
    ours = IDDPM().add_noise(x0, noise, timesteps.float())
    torch.testing.assert_close(ours, reference.add_noise(x0, noise, timesteps), rtol=0, atol=1e-5)


@settings(deadline=None, derandomize=True)
@given(timestep=st.integers(0, 999), within=st.floats(0.05, 0.95))
def test_iddpm_timesteps_are_uniform_integers(timestep: int, within: float) -> None:
    uniform = torch.tensor([(timestep + within) / 1000, 0.0, 1.0], dtype=torch.float64)
    assert IDDPM().sample_timesteps(uniform).tolist() == [timestep, 0, 999]


def posterior_by_bayes(x0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x0) as the product of two Gaussians."""
    kept, before = 1 - BETAS[t], SURVIVING[t - 1]
    precision = kept / BETAS[t] + 1 / (1 - before)
    mean = (kept.sqrt() / BETAS[t] * x_t + before.sqrt() / (1 - before) * x0) / precision
    return mean, 1 / precision


def model_mean(epsilon: Tensor, x_t: Tensor, t: int) -> Tensor:
    """DDPM eq. 11, a form the implementation does not use."""
    kept = 1 - BETAS[t]
    return (x_t - BETAS[t] / (1 - SURVIVING[t]).sqrt() * epsilon) / kept.sqrt()


@pytest.mark.parametrize("t", TIMESTEPS)
def test_the_bound_is_the_kl_between_posterior_and_model_in_bits(t: int) -> None:
    """The model's variance is eq. 15 of IDDPM: exp(v log beta + (1 - v) log beta~)."""
    timesteps = torch.full((2,), float(t))
    x0, noise, x_t = noised(timesteps)
    epsilon = noise + 0.3 * draw(*x0.shape, seed=2)
    raw = draw(*x0.shape, seed=3)
    mean, variance = posterior_by_bayes(x0, x_t, t)
    share = (raw + 1) / 2
    learned = torch.exp(share * BETAS[t].log() + (1 - share) * variance.log())
    kl = distributions.kl_divergence(
        distributions.Normal(mean, variance.sqrt()),
        distributions.Normal(model_mean(epsilon, x_t, t), learned.sqrt()),
    )
    ours = IDDPM().variational_bound(epsilon, raw, x0, x_t, timesteps)
    torch.testing.assert_close(ours, kl.mean(dim=(1, 2, 3)) / math.log(2), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("t", TIMESTEPS[:-2])
def test_the_bound_vanishes_for_the_true_noise_and_the_posteriors_variance(t: int) -> None:
    timesteps = torch.full((2,), float(t))
    x0, noise, x_t = noised(timesteps)
    perfect = IDDPM().variational_bound(noise, -torch.ones_like(x0), x0, x_t, timesteps)
    assert perfect.abs().max() < 1e-10
    wider = IDDPM().variational_bound(noise, torch.ones_like(x0), x0, x_t, timesteps)
    assert (wider > 1e-9).all()


def test_at_zero_the_bound_is_the_decoders_likelihood_of_the_pixel_bin() -> None:
    timesteps = torch.zeros(2)
    x0, noise, x_t = noised(timesteps)
    x0[0, 0, 0, :2] = torch.tensor([1.0, -1.0])  # the end bins reach to infinity
    epsilon, raw = noise + 0.1 * draw(*x0.shape, seed=2), draw(*x0.shape, seed=3)
    share = (raw + 1) / 2
    clipped = BETAS[1] * (1 - SURVIVING[0]) / (1 - SURVIVING[1])  # at 0 itself it would be zero
    deviation = torch.exp(share * BETAS[0].log() + (1 - share) * clipped.log()).sqrt()
    offset = x0 - model_mean(epsilon, x_t, 0)
    upper = torch.where(x0 > 0.999, 1.0, torch.special.ndtr((offset + 1 / 255) / deviation))
    lower = torch.where(x0 < -0.999, 0.0, torch.special.ndtr((offset - 1 / 255) / deviation))
    bits = -(upper - lower).clamp(min=1e-12).log() / math.log(2)
    ours = IDDPM().variational_bound(epsilon, raw, x0, x_t, timesteps)
    torch.testing.assert_close(ours, bits.mean(dim=(1, 2, 3)), rtol=0.02, atol=0)


def test_each_row_is_bound_at_its_own_timestep() -> None:
    timesteps = torch.tensor([0.0, 1.0, 999.0])
    x0, noise, x_t = noised(timesteps)
    epsilon, raw = noise + 0.1, draw(*x0.shape, seed=3)
    together = IDDPM().variational_bound(epsilon, raw, x0, x_t, timesteps)
    for i in range(3):
        row = slice(i, i + 1)
        alone = IDDPM().variational_bound(epsilon[row], raw[row], x0[row], x_t[row], timesteps[row])
        torch.testing.assert_close(together[row], alone)


def test_iddpm_loss_is_the_error_of_epsilon_plus_the_bound() -> None:
    timesteps = torch.tensor([0.0, 40.0, 999.0])
    x0, noise, x_t = noised(timesteps)
    raw = draw(*x0.shape, seed=3)
    loss = IDDPM().loss(torch.cat([noise + 0.5, raw], dim=1), x0, noise, x_t, timesteps)
    bound = IDDPM().variational_bound(noise + 0.5, raw, x0, x_t, timesteps)
    torch.testing.assert_close(loss, 0.25 + bound)


def test_the_bound_teaches_the_variance_and_never_epsilon() -> None:
    timesteps = torch.tensor([0.0, 40.0, 999.0])
    x0, noise, x_t = noised(timesteps)
    epsilon = (noise + 0.5).requires_grad_()
    raw = draw(*x0.shape, seed=3).requires_grad_()
    loss = IDDPM().loss(torch.cat([epsilon, raw], dim=1), x0, noise, x_t, timesteps)
    of_epsilon, of_raw = torch.autograd.grad(loss.sum(), (epsilon, raw))
    of_error_alone = torch.full_like(epsilon, 2 * 0.5 / noise[0].numel())
    torch.testing.assert_close(of_epsilon, of_error_alone)
    assert (of_raw.flatten(1).abs().amax(1) > 0).all()


def test_a_training_step_in_fp32_matches_fp64() -> None:
    timesteps = torch.tensor([0.0, 1.0, 500.0, 999.0])
    x0, noise, x_t = noised(timesteps)
    output = torch.cat([noise + 0.1, draw(*x0.shape, seed=3)], dim=1)
    exact = IDDPM().loss(output, x0, noise, x_t, timesteps)
    single = IDDPM().loss(output.float(), x0.float(), noise.float(), x_t.float(), timesteps)
    torch.testing.assert_close(single.double(), exact, rtol=1e-2, atol=0)


class Gaussian:
    """Data x0 ~ N(mean, deviation^2), one of each a coordinate (1, C, H, W).

    Expectations over x0 and noise are Gauss-Hermite sums of 3 x 3 nodes, exact for the squares of
    a linear network: each batch row is a node, ``weights`` (9,) its probability.
    """

    def __init__(self) -> None:
        self.mean, self.deviation = draw(1, 2, 2, 2), draw(1, 2, 2, 2, seed=1).abs() * 0.5 + 0.2
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
        u, e = torch.meshgrid(nodes, nodes, indexing="ij")
        self.weights = torch.outer(weights, weights).flatten() / (2 * math.pi)
        self.x0 = self.mean + self.deviation * u.reshape(9, 1, 1, 1)
        self.noise = e.reshape(9, 1, 1, 1).expand_as(self.x0)

    def at(self, objective: Objective, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Closed forms a coordinate: mean and variance of x_t, mean of the target, its covariance
        with x_t, and its weight in the loss."""
        s2 = self.deviation**2
        if objective.name == "flow":  # x_t = (1 - t) x0 + t e; target e - x0
            share = t / 1000
            variance = (1 - share) ** 2 * s2 + share**2
            covariance = share - (1 - share) * s2
            return (1 - share) * self.mean, variance, -self.mean, covariance, torch.ones(())
        signal = SURVIVING[t]  # x_t = sqrt(signal) x0 + sqrt(1 - signal) e; target e
        variance = signal * s2 + 1 - signal
        gamma = getattr(objective, "min_snr_gamma", None) or math.inf
        snr = signal / (1 - signal)
        weight = torch.minimum(snr, torch.tensor(gamma)) / snr
        covariance = (1 - signal).sqrt().expand_as(s2)
        return signal.sqrt() * self.mean, variance, torch.zeros_like(s2), covariance, weight

    def expected_loss(self, objective: Objective, output: Tensor, t: int) -> Tensor:
        timesteps = torch.full((9,), float(t), dtype=torch.float64)
        x_t = objective.add_noise(self.x0, self.noise, timesteps)
        return self.weights @ objective.loss(output, self.x0, self.noise, x_t, timesteps)


OBJECTIVES = [get_objective("flow"), get_objective("iddpm"), IDDPM(MIN_SNR_GAMMA), IDDPM(0.5)]


@pytest.mark.parametrize("t", [0, 1, 90, 500, 999])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_linear_networks_gradient_is_the_closed_form_on_gaussian_data(
    objective: Objective, t: int
) -> None:
    """output = a x_t + c: with C coordinates, dL/da = 2 w (a E[x^2] + c E[x] - E[x target]) / C."""
    data = Gaussian()
    timesteps = torch.full((9,), float(t), dtype=torch.float64)
    x_t = objective.add_noise(data.x0, data.noise, timesteps)
    mean, variance, target, covariance, weight = data.at(objective, t)
    best = covariance / variance
    for off in (0.0, 0.7):  # the optimal linear predictor, and another
        a = (best + off).requires_grad_()
        c = (target - best * mean - 0.4 * off).requires_grad_()
        output = a * x_t + c
        if objective.predicts_variance:
            output = torch.cat([output, torch.full_like(output, 0.3)], dim=1)
        of_a, of_c = torch.autograd.grad(data.expected_loss(objective, output, t), (a, c))
        a, c, num = a.detach(), c.detach(), a.numel()
        second = variance + mean**2
        expected_a = 2 * weight / num * (a * second + c * mean - covariance - mean * target)
        expected_c = 2 * weight / num * (a * mean + c - target)
        torch.testing.assert_close(of_a, expected_a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(of_c, expected_c, rtol=1e-9, atol=1e-12)
        assert off or max(of_a.abs().max(), of_c.abs().max()) < 1e-12


@pytest.mark.parametrize("t", [1, 90, 500, 998])
def test_the_learned_variance_settles_at_the_reverse_steps_own(t: int) -> None:
    """For Gaussian data q(x_{t-1} | x_t) is Gaussian, its variance by Bayes' rule: with the best
    epsilon the bound's gradient is zero there, and elsewhere that of a Gaussian's KL."""
    data, iddpm = Gaussian(), IDDPM()
    timesteps = torch.full((9,), float(t), dtype=torch.float64)
    x_t = iddpm.add_noise(data.x0, data.noise, timesteps)
    mean, variance, target, covariance, _ = data.at(iddpm, t)
    epsilon = target + covariance / variance * (x_t - mean)
    before = SURVIVING[t - 1] * data.deviation**2 + 1 - SURVIVING[t - 1]
    reverse = before * BETAS[t] / ((1 - BETAS[t]) * before + BETAS[t])  # Var(x_{t-1} | x_t)
    posterior = BETAS[t] * (1 - SURVIVING[t - 1]) / (1 - SURVIVING[t])
    width = (BETAS[t] / posterior).log()
    best = 2 * (reverse / posterior).log() / width - 1
    for off in (0.0, 0.5):
        raw = (best + off).requires_grad_()
        output = torch.cat([epsilon, raw.expand_as(epsilon)], dim=1)
        (of_raw,) = torch.autograd.grad(data.expected_loss(iddpm, output, t), raw)
        learned = reverse * (0.5 * off * width).exp()
        expected = width / 4 * (1 - reverse / learned) / math.log(2) / raw.numel()
        torch.testing.assert_close(of_raw, expected, rtol=1e-6, atol=1e-12)


def test_min_snr_weighs_epsilon_alone_and_is_off_by_default() -> None:
    """Hang et al. 2023: min(SNR, gamma) / SNR; SNR is below 5 from timestep 130 on."""
    timesteps = torch.tensor([0.0, 10.0, 400.0, 999.0])
    x0, noise, x_t = noised(timesteps)
    output = torch.cat([noise + 0.5, draw(*x0.shape, seed=3)], dim=1)
    bound = IDDPM().variational_bound(noise + 0.5, output[:, 2:], x0, x_t, timesteps)
    plain = get_objective("iddpm").loss(output, x0, noise, x_t, timesteps)
    weighed = get_objective("iddpm", min_snr_gamma=5).loss(output, x0, noise, x_t, timesteps)
    snr = (SURVIVING / (1 - SURVIVING))[timesteps.long()]
    torch.testing.assert_close(plain, 0.25 + bound)
    torch.testing.assert_close(weighed, 0.25 * (5 / snr).clamp(max=1) + bound)
    assert torch.equal(weighed[2:], plain[2:])
    assert (weighed - bound)[0] < 0.001 * (plain - bound)[0]


@pytest.mark.parametrize(
    ("name", "gamma"),
    [("flow", 5.0), ("iddpm", 0.0), ("iddpm", -1.0), ("iddpm", math.nan), ("iddpm", math.inf)],
)
def test_min_snr_that_means_nothing_is_refused(name: ObjectiveName, gamma: float) -> None:
    with pytest.raises(ModelInputError, match=rf"min_snr_gamma = {gamma} with objective '{name}'"):
        get_objective(name, min_snr_gamma=gamma)


def test_objectives_by_name_say_whether_they_learn_variance() -> None:
    assert [get_objective(name).name for name in ("flow", "iddpm")] == ["flow", "iddpm"]
    assert not get_objective("flow").predicts_variance
    assert get_objective("iddpm").predicts_variance

"""Closed forms of the noise levels and the learning rate."""

import pytest
import torch
from scipy import stats

from schedule import beta_at, denoised, linear_quadratic, lr_at, sample_sigma, to_edm, to_flow


def test_eight_steps_are_the_published_list():
    published = [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0]
    assert linear_quadratic(8) == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 64])
def test_sigmas_fall_from_one_to_zero(n):
    sigmas = linear_quadratic(n)
    assert len(sigmas) == n + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    assert all(a > b for a, b in zip(sigmas, sigmas[1:]))


@pytest.mark.parametrize("n", [16, 17, 64])
def test_parabola_continues_the_line_in_value_and_slope(n):
    m, sigmas = n // 2, linear_quadratic(n)
    assert sigmas[m] == pytest.approx(0.975, abs=1e-12)
    # a parabola is known from three points: its slope at m, extrapolated from the points m, m + 1, m + 2
    slope = -1.5 * sigmas[m] + 2 * sigmas[m + 1] - 0.5 * sigmas[m + 2]
    assert slope == pytest.approx(-0.025 / m, abs=1e-9)
    third = [sigmas[i + 3] - 3 * sigmas[i + 2] + 3 * sigmas[i + 1] - sigmas[i] for i in range(m, n - 2)]
    assert third == pytest.approx([0.0] * len(third), abs=1e-12), "not one parabola down to 0"


@pytest.mark.parametrize("arguments", [(0,), (-3,), (8, 0.0), (8, 0.7)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="num_steps"):
        linear_quadratic(*arguments)


def test_beta_is_beta0_at_step_zero_halves_its_excess_and_tends_to_uniform():
    assert beta_at(0) == 3 and beta_at(200) == 2 and beta_at(400) == 1.5
    assert beta_at(0, beta0=5, half_life=10) == 5 and beta_at(10, beta0=5, half_life=10) == 3
    assert beta_at(4000) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("wrong", [{"beta0": 0.5}, {"half_life": 0}])
def test_beta_below_uniform_or_without_half_life_is_refused(wrong):
    with pytest.raises(ValueError, match="need beta0 >= 1"):
        beta_at(1, **wrong)


@pytest.mark.parametrize("beta", [1.0, 1.7, 3.0])
def test_drawn_sigmas_follow_beta_one_beta(beta):
    sigma = sample_sigma(20_000, beta, torch.Generator().manual_seed(1)).double().numpy()
    assert stats.kstest(sigma, stats.beta(1, beta).cdf).statistic < 0.011  # 1.6 / sqrt(n): the 1 % bound
    assert stats.kstest(sigma, lambda x: 1 - (1 - x) ** beta).statistic < 0.011  # integral of Eq. (5)
    assert stats.kstest(sigma, stats.beta(1, beta + 0.2).cdf).statistic > 0.02, "the test cannot tell betas apart"


def test_drawn_sigmas_are_a_function_of_the_generator():
    a, b = (sample_sigma(5, 2.0, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (5,) and a.min() >= 0 and a.max() < 1


def test_edm_view_of_a_noised_latent_is_clean_plus_noise_and_denoises_to_it():
    rng = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)
    for sigma in (0.0, 0.2, 0.9):
        z = (1 - sigma) * z0 + sigma * eps
        x, s = to_edm(z, sigma)
        torch.testing.assert_close(x, z0 + s * eps)
        torch.testing.assert_close(denoised(z, sigma, z0 - eps), z0)
        back, sigma_back = to_flow(x, s)
        torch.testing.assert_close(back, z)
        assert sigma_back == pytest.approx(sigma, abs=1e-12)


def test_edm_ode_and_flow_ode_give_the_same_trajectory():
    """Eq. (2) in (x, s) and dz/dsigma = -velocity in (z, sigma), both by tiny Euler steps of one non-linear model."""

    def velocity(z, sigma):
        return torch.tanh(2 * z) * (1 - sigma) - 0.7 * z + 0.3

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, end, n = 0.8, 0.1, 20_000
    x, s = to_edm(z, start)
    ratio = ((end / (1 - end)) / s) ** (1 / n)  # s falls geometrically
    for i in range(n):
        sigma = start + (end - start) * i / n
        z = z - (end - start) / n * velocity(z, sigma)
        z_here, sigma_here = to_flow(x, s)
        d = denoised(z_here, sigma_here, velocity(z_here, sigma_here))
        x = x + (s * ratio - s) * -(d - x) / s  # Eq. (2)
        s = s * ratio
    torch.testing.assert_close(to_edm(z, end)[0], x, atol=2e-4, rtol=2e-4)


def test_learning_rate_rises_to_lr_and_falls_to_zero_along_a_cosine():
    rates = [lr_at(step, 100, 2.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10])) and all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert lr_at(0, 10, 1.0, 0) == 1.0, "no warm-up starts at lr"
    assert lr_at(500, 100, 2.0, 10) == pytest.approx(0, abs=1e-12), "past the end it stays 0"

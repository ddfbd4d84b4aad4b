"""The noise schedules against stock schedulers, and the conversion of predictions in float64."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from vdu_peft.schedule import MIN_ALPHA, NoiseSchedule

STOCK = {
    "ddpm": DDPMScheduler(),
    "ddim": DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("scheduler", STOCK.values(), ids=STOCK)
def test_noise_is_added_as_the_stock_scheduler_adds_it(scheduler):
    images, noise = torch.randn(2, 6, 3, 4, 4)
    schedule = NoiseSchedule(scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        expected = scheduler.scale_noise(images, scheduler.timesteps[999 - TIMESTEPS], noise)
    else:
        expected = scheduler.add_noise(images, noise, TIMESTEPS)
    # The least alpha, 2.4e-4 instead of 0, shows at a flow's last timestep alone.
    least = MIN_ALPHA * images.abs().max().item() if schedule.prediction_type == "flow" else 0
    torch.testing.assert_close(schedule.add_noise(images, noise, TIMESTEPS), expected, atol=least + 1e-6, rtol=0)
    torch.testing.assert_close(schedule.add_noise(images, noise, TIMESTEPS)[:-1], expected[:-1], atol=1e-6, rtol=0)


def exact_schedule(prediction_type: str) -> NoiseSchedule:
    """In float64, at zero terminal SNR."""
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0)
        if prediction_type == "flow"
        else DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    )
    schedule = NoiseSchedule(scheduler)
    schedule.alphas, schedule.sigmas = schedule.alphas.double(), schedule.sigmas.double()
    return schedule


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_perfect_prediction_gives_the_noise(prediction_type):
    """In float64, from each kind's own definition; at zero terminal SNR, too."""
    schedule = exact_schedule(prediction_type)
    images, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    x_t = schedule.add_noise(images, noise, TIMESTEPS)
    alpha, sigma = (table[TIMESTEPS].view(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    prediction = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * images,
        "sample": images,
        "flow": noise - images,
    }[prediction_type]
    found = schedule.noise_pred(prediction, x_t, TIMESTEPS)
    torch.testing.assert_close(found, noise, atol=1e-12, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_an_error_of_the_noise_is_brought_back_to_the_networks_own(prediction_type):
    """Two predictions' difference, through the noise that they mean and back; for v that over alpha."""
    schedule = exact_schedule(prediction_type)
    prediction, target, x_t = torch.randn(3, 6, 3, 4, 4, dtype=torch.float64)
    noise_error = schedule.noise_pred(prediction, x_t, TIMESTEPS) - schedule.noise_pred(target, x_t, TIMESTEPS)
    found = schedule.own_error(noise_error, TIMESTEPS)
    torch.testing.assert_close(found, prediction - target, atol=1e-9, rtol=0)
    if prediction_type == "v_prediction":
        alpha = schedule.alphas[TIMESTEPS].view(-1, 1, 1, 1)
        # alpha at the last timestep, where it is set to its least, is not exactly that of alpha^2 + sigma^2 = 1.
        torch.testing.assert_close(found, noise_error / alpha, atol=1e-6, rtol=0)


def test_a_flow_tells_its_network_sigma_and_samples_with_the_shift_of_its_resolution():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(4, mu=1.0)  # a used scheduler gives the same schedule
    schedule = NoiseSchedule(scheduler, image_tokens=256, even_sigmas=True)
    torch.testing.assert_close(schedule.network_timesteps, torch.arange(1, 1001).float())
    sampler = schedule.sampler(4, torch.device("cpu"))
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    # Esser et al. 2024, equation 23, with the exponential of diffusers' base_shift at 256 tokens.
    shift = torch.tensor(0.5).exp()
    torch.testing.assert_close(sampler.sigmas[:-1], shift * even / (1 + (shift - 1) * even))


def test_what_an_image_shows_is_decided_in_more_noise_the_larger_it_is_and_the_more_images_differ():
    """Against the noise's own ratio to the signal, at both ends; and of any schedule there is at least one timestep."""
    schedule = NoiseSchedule(DDPMScheduler())
    ratio = schedule.sigmas / schedule.alphas
    assert schedule.deciding_timesteps(16, 2.44) == (100, 436)
    for size, deviation in ((8, 1.2), (28, 4.9), (32, 15.1), (256, 90.0)):
        lowest, highest = schedule.deciding_timesteps(size, deviation)
        assert ratio[lowest - 1] <= 0.34 * size / 16 <= ratio[lowest]
        assert ratio[highest - 1] <= deviation <= ratio[highest]
    assert schedule.deciding_timesteps(16, 0.0) == schedule.deciding_timesteps(16, 0.3) == (100, 1000)
    assert schedule.deciding_timesteps(16, 1e9) == (100, 1000)
    assert NoiseSchedule(DDPMScheduler(beta_start=1e-6, beta_end=1e-6)).deciding_timesteps(64, 9.0) == (999, 1000)
    assert NoiseSchedule(DDPMScheduler(beta_start=0.9, beta_end=0.9)).deciding_timesteps(1, 0.1) == (0, 1)

"""Targets and weights, against their definitions."""

import pytest
import torch
from diffusers import DDPMScheduler

from rankfold.toolkit.core.randomness import generator, sample_order
from rankfold.toolkit.diffusion import losses
from rankfold.toolkit.diffusion.noise import DiscreteNoise, FlowNoise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_recovers_the_clean_latents(kind):
    """clean is a known function of noisy latents and target; this holds for the right target only."""
    scheduler = DDPMScheduler(prediction_type=kind)
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([5, 300, 700])
    noisy, goal = scheduler.add_noise(clean, noise, timesteps), losses.target(scheduler, clean, noise, timesteps)
    a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if kind == "epsilon":
        back = (noisy - (1 - a).sqrt() * goal) / a.sqrt()
    else:
        back = a.sqrt() * noisy - (1 - a).sqrt() * goal
    torch.testing.assert_close(back, clean, rtol=1e-3, atol=1e-3)


def test_other_predictions_are_refused():
    with pytest.raises(ValueError, match="sample"):
        losses.target(DDPMScheduler(prediction_type="sample"), *torch.randn(2, 1, 4, 8, 8), torch.tensor([1]))


@pytest.mark.parametrize(
    "noise",
    [DiscreteNoise(DDPMScheduler()), DiscreteNoise(DDPMScheduler(prediction_type="v_prediction")), FlowNoise()],
    ids=["epsilon", "v", "flow"],
)
def test_weights_speak_of_the_same_error(noise):
    """A wrong prediction leads to clean latents that are wrong by clean_error, whatever is predicted."""
    levels = torch.cat([noise.timestep_at(share, 8, 8) for share in (0.1, 0.4, 0.6, 0.9)])
    clean, other, wrong = torch.randn(3, 4, 2, 4, 4)
    noisy, goal = noise.add_noise(clean, other, levels), noise.target(clean, other, levels)
    snr = noise.snr(levels).view(-1, 1, 1, 1)
    if isinstance(noise, FlowNoise):
        back = lambda said: noisy - levels.view(-1, 1, 1, 1) * said  # noqa: E731
    elif noise.scheduler.config.prediction_type == "epsilon":
        back = lambda said: noisy * (1 + 1 / snr).sqrt() - said / snr.sqrt()  # noqa: E731
    else:
        back = lambda said: (noisy * snr.sqrt() - said) / (1 + snr).sqrt()  # noqa: E731
    torch.testing.assert_close(back(goal), clean, rtol=1e-3, atol=1e-3)
    share = (back(goal + wrong) - clean).square().flatten(1).mean(1) / wrong.square().flatten(1).mean(1)
    torch.testing.assert_close(share, noise.clean_error_ratio(levels), rtol=1e-2, atol=1e-4)


def test_weights_of_timesteps():
    """As the papers write them for epsilon: min(snr, 5) / snr, with its limit 1 at zero terminal SNR, and 1 / sqrt(snr)."""
    snr = torch.tensor([1e-12, 1.0, 20.0])
    error = losses.clean_error_ratio("epsilon", snr)
    torch.testing.assert_close(losses.min_snr_weight(snr, 5.0) * error, torch.tensor([1.0, 1.0, 0.25]))
    torch.testing.assert_close((losses.debiased_weight(snr) * error)[1:], torch.tensor([1.0, 20**-0.5]))
    zero = DiscreteNoise(DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    assert (
        losses.min_snr_weight(zero.snr(torch.tensor([999])), 5.0) * zero.clean_error_ratio(torch.tensor([999])) < 1e-6
    )


def test_order_visits_every_row_once_a_pass():
    rows = sample_order(3, 7, 0, 21)
    assert all(sorted(rows[k : k + 7]) == list(range(7)) for k in (0, 7, 14))
    assert rows[5:12] == sample_order(3, 7, 5, 7)
    assert rows != sample_order(4, 7, 0, 21)


def test_generators_differ_by_every_part_of_the_key():
    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]
    drawn = {torch.rand(1, generator=generator(*key)).item() for key in keys}
    assert len(drawn) == 4
    assert torch.rand(1, generator=generator(0, 1, 2)).item() in drawn

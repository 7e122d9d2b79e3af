"""Targets and weights, against their definitions."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from rankfold.toolkit import losses
from rankfold.toolkit.randomness import generator, order


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


def test_min_snr_makes_both_predictions_one_loss():
    """Both weights turn the loss into min(snr, gamma) times the error of the clean latents."""
    scheduler = DDPMScheduler()
    timesteps = torch.arange(0, 1000, 50)
    snr = compute_snr(scheduler, timesteps)
    # error of epsilon = snr * error of clean; error of v = (snr + 1) * error of clean
    expected = snr.clamp(max=5.0)
    torch.testing.assert_close(losses.min_snr_weight("epsilon", snr, 5.0) * snr, expected)
    torch.testing.assert_close(losses.min_snr_weight("v_prediction", snr, 5.0) * (snr + 1), expected)
    assert losses.min_snr_weight("epsilon", torch.zeros(1), 5.0) == 1


def test_order_visits_every_row_once_a_pass():
    rows = order(3, 7, 0, 21)
    assert all(sorted(rows[k : k + 7]) == list(range(7)) for k in (0, 7, 14))
    assert rows[5:12] == order(3, 7, 5, 7)
    assert rows != order(4, 7, 0, 21)


def test_generators_differ_by_every_part_of_the_key():
    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]
    drawn = {torch.rand(1, generator=generator(*key)).item() for key in keys}
    assert len(drawn) == 4
    assert torch.rand(1, generator=generator(0, 1, 2)).item() in drawn

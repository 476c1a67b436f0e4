"""From noise to latents: the noise schedule, DDIM, guidance."""

from sampler.ddim import ddim
from sampler.guidance import guided
from sampler.schedule import add_noise, alphas_cumprod, noise, v_weight

__all__ = ["add_noise", "alphas_cumprod", "ddim", "guided", "noise", "v_weight"]

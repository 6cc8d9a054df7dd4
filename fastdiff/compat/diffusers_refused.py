"""The scheduler classes of diffusers 0.42 that no seat reproduces, each with its reason. PEERS.md shows the same lines."""

from __future__ import annotations

from .diffusers_classes import CLASSES

TOKENS = "works on tokens, not on Gaussian noise"
PIPELINE = "its step takes more than a seat is handed: "
INVERSE = "runs from data to noise"
REFUSED = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CogVideoXDPMScheduler": PIPELINE + "the time before and the prediction before",
    "ConsistencyDecoderScheduler": "decodes latents inside an autoencoder, not in a pipeline's loop",
    "CosineDPMSolverMultistepScheduler": "tells its network atan(sigma), a preconditioning that is not known here",
    "DDIMInverseScheduler": INVERSE,
    "DDPMWuerstchenScheduler": "its list of times holds the end, and its levels are no table that its config describes",
    "DPMSolverMultistepInverseScheduler": INVERSE,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "FlowMapEulerDiscreteScheduler": "its networks predict a whole step and are told where it ends",
    "HeliosDMDScheduler": PIPELINE + "noises and levels of earlier stages",
    "HeliosScheduler": "its set_timesteps takes the stage of a pyramid",
    "KarrasVeScheduler": PIPELINE + "the levels around the churn (deprecated in diffusers)",
    "LTXEulerAncestralRFScheduler": "goes down to a fraction of the next sigma before it adds noise: no solver here",
    "MiniMaxH3Scheduler": "its networks predict the velocity towards data, and n steps are n - 1 calls",
    "PiflowScheduler": "its networks return several predictions a call",
    "RFD4ProteinaScheduler": PIPELINE + "the mask of the tokens that move",
    "RePaintScheduler": PIPELINE + "the image and its mask",
    "SCMScheduler": "its set_timesteps takes the noisiest and the middle time, and its noise has standard deviation sigma_data",
    "ScoreSdeVeScheduler": "has a step for the predictor and one for the corrector, whose size depends on the whole batch",
    "ScoreSdeVpScheduler": "has a step for the predictor alone, on its own list of times (deprecated in diffusers)",
    "UnCLIPScheduler": PIPELINE + "the time that follows",
    "VQDiffusionScheduler": TOKENS,
}


def why_not(name: str) -> str:
    """The one line for a class whose images no seat gives."""
    reason = REFUSED.get(name, "not a scheduler class of diffusers 0.42")
    return f"{name} is not reproduced ({reason}): give a solver of fd.list_solvers(), or one of {', '.join(sorted(CLASSES))}"

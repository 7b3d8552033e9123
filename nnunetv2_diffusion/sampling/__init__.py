"""The reverse loop, its chains, noise and views: no nnU-Net is known here, and networks by what chains call."""

from nnunetv2_diffusion.sampling.chain import BernoulliChain, Chain, CodeChain, GaussianChain, SinglePass, Window
from nnunetv2_diffusion.sampling.config import SamplingConfig
from nnunetv2_diffusion.sampling.loop import Estimator, Step, mean_of_samples, run_chain
from nnunetv2_diffusion.sampling.noise import BoxNoise, Noise, NoiseByContent, NoiseByPosition

__all__ = [
    "BernoulliChain",
    "BoxNoise",
    "Chain",
    "CodeChain",
    "Estimator",
    "GaussianChain",
    "Noise",
    "NoiseByContent",
    "NoiseByPosition",
    "SamplingConfig",
    "SinglePass",
    "Step",
    "Window",
    "mean_of_samples",
    "run_chain",
]

"""The one loop, run on functions instead of networks."""

from types import SimpleNamespace

from nnunetv2_diffusion.sampling import (
    BernoulliChain,
    Estimator,
    GaussianChain,
    SamplingConfig,
    Window,
    run_chain,
)


class GaussianOracle:
    """A function of (x_t, t) that estimates x_start, as a network that a Gaussian chain calls."""

    self_conditioning = False

    def __init__(self, process, predict, channels):
        self.process, self.predict = process, predict
        self.encoding = SimpleNamespace(channels=channels, encode=lambda p: p)

    def __call__(self, image, x_t, t, estimate, full_resolution_only):
        return self.predict(x_t, t)

    def probabilities(self, x_start):
        return (x_start + 1) / 2


class BernoulliOracle:
    """A function of (y_t, t) that estimates P(y_t is wrong), as a network that a Bernoulli chain calls."""

    sigmoid = True

    def __init__(self, process, predict, prior):
        self.process, self.predict, self.prior, self.num_heads = process, predict, prior, prior.shape[1]

    def look(self, image):
        return Window(image, self.prior)

    def noise_probability(self, image, y_t, prior, t, features):
        return self.predict(y_t, t)


class Given:
    """Noise: a first state, then what a function returns."""

    def __init__(self, first, further):
        self.first, self.further = first, further

    def normal(self, step):
        return self.first if step == 0 else self.further()

    uniform = normal


def reverse_process(process, predict, x_t, noise, sampler="ddpm", eta=0.0):
    """The loop from x_t with an estimator of x_start; yields its estimates."""
    chain = GaussianChain(
        GaussianOracle(process, predict, x_t.shape[1]), SamplingConfig(process.num_timesteps, sampler, eta)
    )
    for step in run_chain(chain, Estimator(chain, x_t), [[()]] * chain.steps, Given(x_t, noise)):
        yield 2 * step.answer - 1


def bernoulli_reverse_process(process, predict, prior, uniform, sampler="ddpm"):
    """The loop from a draw of the prior with an estimator of the noise; yields its soft masks."""
    chain = BernoulliChain(BernoulliOracle(process, predict, prior), SamplingConfig(process.num_timesteps, sampler))
    for step in run_chain(chain, Estimator(chain, prior), [[()]] * chain.steps, Given(uniform(), uniform)):
        yield step.answer

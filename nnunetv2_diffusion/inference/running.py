"""Moments and entropies over the samples of a case, in memory that does not depend on their number."""

from math import log

import torch


def entropy_of(probabilities: torch.Tensor, regions: bool = False) -> torch.Tensor:
    """Entropy of a prediction at every voxel, in nats.

    Args:
        probabilities: (K, *spatial), values in [0, 1]; what lies outside by rounding is clamped.
        regions: heads are independent (sigmoid), not classes (softmax).

    Returns:
        float32, (*spatial). Classes: -sum_k p_k ln p_k, in [0, ln K]. Regions: the mean over heads of
        -p ln p - (1 - p) ln(1 - p), in [0, ln 2].
    """
    result = torch.zeros(probabilities.shape[1:], device=probabilities.device)
    for head in probabilities:  # one by one, so that nothing of the size of all heads is made
        head = head.float().clamp(0, 1)
        result += torch.special.entr(head)
        if regions:
            result += torch.special.entr(1 - head)
    return result / len(probabilities) if regions else result


def map_limits(heads: int, regions: bool = False) -> dict[str, float]:
    """Largest possible value of each map: kind -> value; the scale for grey images and colour bars."""
    entropy = log(2 if regions else max(heads, 2))
    return {"probability": 1.0, "entropy": entropy, "mutual_information": entropy, "variance": 0.25}


class RunningMoments:
    """Mean, variance and entropies of the probabilities of samples, added one after the other.

    It holds K + 2 volumes in float32, on the device of the first sample, whatever the number of samples N; K of a
    single one, whose statistics are made when they are asked for. The updates are Welford's (Technometrics 1962), which
    do not cancel: each rounds by 2^-25, which adds up to less than (N + 9) 2^-26 in the mean at worst, and to about
    1e-7 in practice.

    Attributes:
        regions: heads are independent (sigmoid), not classes (softmax).
        count: samples so far.
    """

    def __init__(self, regions: bool = False):
        self.regions = regions
        self._forget()

    def _forget(self) -> None:
        self.count = 0
        self._mean = self._squares = self._entropy = torch.empty(0)

    @torch.inference_mode()  # so that samples may come from inside and outside of it
    def add(self, probabilities: torch.Tensor, given_away: bool = False) -> None:
        """Take in a sample.

        Args:
            probabilities: (K, *spatial), values in [0, 1], any floating type; it is neither kept nor changed.
            given_away: the caller needs it no more: it may be kept and changed, which spares a copy of the first one.

        Raises:
            ValueError: no spatial axes, no floating type, or another shape than that of the first sample.
        """
        if probabilities.ndim < 2 or not probabilities.is_floating_point():
            raise ValueError(
                f"a sample has shape {tuple(probabilities.shape)} and type {probabilities.dtype}, "
                "expected probabilities (heads, *spatial)"
            )
        if self.count == 0:
            keep = given_away and probabilities.dtype == torch.float32
            self._mean = probabilities if keep else probabilities.detach().to(torch.float32, copy=True)
            self.count = 1
            return
        if probabilities.shape != self._mean.shape:
            raise ValueError(
                f"a sample has shape {tuple(probabilities.shape)}, the first had {tuple(self._mean.shape)}"
            )
        if self.count == 1:
            self._squares, self._entropy = torch.zeros_like(self._mean[0]), entropy_of(self._mean, self.regions)
        self.count += 1
        probabilities = probabilities.to(self._mean.device)
        for mean, head in zip(self._mean, probabilities, strict=True):  # views: the updates are in place
            before = head - mean
            mean += before / self.count
            self._squares += before * (head - mean)
        self._entropy += (entropy_of(probabilities, self.regions) - self._entropy) / self.count

    def _not_empty(self) -> None:
        if self.count == 0:
            raise ValueError("there is no sample yet, expected at least one")

    def mean(self) -> torch.Tensor:
        """Mean probability, (K, *spatial). It is the running sum itself: to be copied before more is added."""
        self._not_empty()
        return self._mean

    def take_mean(self) -> torch.Tensor:
        """As ``mean``, but for the caller to keep and change: there are no samples any more."""
        mean = self.mean()
        self._forget()
        return mean

    def variance(self) -> torch.Tensor:
        """Mean over heads of the variance over samples (divided by N, not N - 1), (*spatial), in [0, 1/4].

        K times it is the total predictive variance, the trace of the covariance of the heads. 0 for one sample.
        """
        self._not_empty()
        if self.count == 1:
            return torch.zeros_like(self._mean[0])
        return self._squares / (self.count * len(self._mean))

    def entropy(self) -> torch.Tensor:
        """Entropy of the mean probability in nats, (*spatial): the total uncertainty; see ``entropy_of``."""
        self._not_empty()
        return entropy_of(self._mean, self.regions)

    def expected_entropy(self) -> torch.Tensor:
        """Mean over samples of their entropy in nats, (*spatial): what samples agree to be uncertain about.

        As the mean, it is to be copied before more is added.
        """
        self._not_empty()
        return self.entropy() if self.count == 1 else self._entropy

    def mutual_information(self) -> torch.Tensor:
        """Entropy of the mean minus mean entropy in nats, (*spatial): how far samples disagree. 0 for one sample.

        It is never negative; what rounding makes so is set to 0.
        """
        self._not_empty()
        if self.count == 1:
            return torch.zeros_like(self._mean[0])
        return (self.entropy() - self._entropy).clamp_(min=0)

    def maps(self) -> dict[str, torch.Tensor]:
        """The maps (*spatial) that are written: entropy, mutual_information and variance."""
        return {
            "entropy": self.entropy(),
            "mutual_information": self.mutual_information(),
            "variance": self.variance(),
        }

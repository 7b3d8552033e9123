"""How a mask of K classes becomes the channels that a diffusion process works on.

One-hot is the usual encoding: K channels. Analog bits (Chen, Zhang, Hinton 2022) write the class in binary:
ceil(log2 K) channels, 7 instead of 104. Of class probabilities both give the expected code, which is linear in them.
"""

import math

import torch

ENCODINGS = ("one-hot", "analog-bits")


class MaskEncoding:
    """One-hot classes, or regions as they are: the channels are the probabilities themselves.

    Args:
        num_heads: K, classes with background, or regions.

    Attributes:
        channels: of an encoded mask.
    """

    def __init__(self, num_heads: int):
        self.num_heads = num_heads
        self.channels = num_heads

    def encode(self, p: torch.Tensor) -> torch.Tensor:
        """Expected code of probabilities (B, K, *spatial), in [0, 1], (B, channels, *spatial)."""
        return p

    def encode_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Code of a label map (B, 1, *spatial) with integers 0 .. K-1, float32 (B, channels, *spatial)."""
        code = torch.zeros(len(labels), self.channels, *labels.shape[2:], device=labels.device)
        return code.scatter_(1, labels.long(), 1.0)

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, K, *spatial) of a code in [0, 1]."""
        return code


class AnalogBits(MaskEncoding):
    """The class number in binary, lowest bit first.

    For K = 2 the one channel is the probability of class 1, as in the second channel of one-hot.

    Raises:
        ValueError: for less than two classes.
    """

    def __init__(self, num_heads: int):
        super().__init__(num_heads)
        if num_heads < 2:
            raise ValueError(f"analog bits need at least 2 classes, got {num_heads}")
        self.channels = math.ceil(math.log2(num_heads))
        numbers = torch.arange(num_heads)[:, None]
        self.codes = (numbers >> torch.arange(self.channels) & 1).float()  # (K, channels)

    def encode(self, p: torch.Tensor) -> torch.Tensor:
        """See ``MaskEncoding``."""
        codes = self.codes.to(p.device, p.dtype)
        with torch.autocast(p.device.type, enabled=False):  # it would multiply in half precision
            return torch.matmul(codes.T, p.flatten(2)).unflatten(2, p.shape[2:])

    def encode_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """See ``MaskEncoding``."""
        bits = torch.arange(self.channels, device=labels.device).reshape(1, -1, *[1] * (labels.ndim - 2))
        return (labels.long() >> bits & 1).float()

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes if the bits are independent, in float32; numbers >= K have none.

        ``encode(decode(code))`` is the code again if K is a power of two, or if the bits are 0 and 1.
        """
        # log P(class) = sum over bits of log P(bit): two matrix products instead of K x channels maps
        codes = self.codes.to(code.device)
        bits = code.float().clamp(1e-7, 1 - 1e-7).flatten(2)
        with torch.autocast(code.device.type, enabled=False):
            logits = torch.matmul(codes, bits.log()) + torch.matmul(1 - codes, (1 - bits).log())
        return logits.softmax(1).unflatten(2, code.shape[2:])


def make_encoding(name: str, num_heads: int, regions: bool = False) -> MaskEncoding:
    """The encoding of a network's heads.

    Args:
        name: "one-hot" or "analog-bits".
        num_heads: K.
        regions: heads are independent regions: bits as they are, with any name.

    Raises:
        ValueError: for another name.
    """
    if name not in ENCODINGS:
        raise ValueError(f"mask encoding is {name!r}, expected one of {', '.join(ENCODINGS)}")
    if regions or name == "one-hot" or num_heads < 2:
        return MaskEncoding(num_heads)
    return AnalogBits(num_heads)

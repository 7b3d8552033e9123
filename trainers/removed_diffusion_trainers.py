"""Trainers of earlier versions: nnU-Net's commands tell who asks for one of them why it is gone."""

from typing import Any

try:
    from nnunetv2_diffusion.removed import removed_trainer
except Exception:  # nnU-Net imports every file here while it searches: none may stop it

    def removed_trainer(name: Any) -> str | None:
        """Nothing is known of any."""
        return None


def __getattr__(name: str) -> None:
    sentence = removed_trainer(name)
    if sentence:
        raise RuntimeError(sentence)
    raise AttributeError(name)

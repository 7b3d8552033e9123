"""Trainer: nnU-Net's own trainer, its length read from the settings, to compare with at equal iterations."""

try:
    from nnunetv2_diffusion.training import BaselineTrainer

    class nnUNetTrainerBaseline(BaselineTrainer):
        """nnU-Net's own trainer, its length read from the settings, to compare with at equal iterations."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerBaseline":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

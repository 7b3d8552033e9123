"""Trainer: recycled masks for some samples, the noised ground truth for others."""

try:
    from nnunetv2_diffusion.training import MixedTrainer

    class nnUNetTrainerRecycleMixed(MixedTrainer):
        """recycled masks for some samples, the noised ground truth for others."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerRecycleMixed":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

"""Trainer: recycling across views: the first pass sees another view of the place."""

try:
    from nnunetv2_diffusion.training import ViewTrainer

    class nnUNetTrainerRecycleView(ViewTrainer):
        """recycling across views: the first pass sees another view of the place."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerRecycleView":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

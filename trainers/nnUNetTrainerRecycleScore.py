"""Trainer: masks that are draws; another draw is recycled into the loss."""

try:
    from nnunetv2_diffusion.training import ScoreTrainer

    class nnUNetTrainerRecycleScore(ScoreTrainer):
        """masks that are draws; another draw is recycled into the loss."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerRecycleScore":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

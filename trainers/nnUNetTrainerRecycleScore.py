"""Trainer: several plausible masks of an image, each from other random numbers (experimental)."""

try:
    from nnunetv2_diffusion.methods.recycle_score import RecycleScoreTrainer

    class nnUNetTrainerRecycleScore(RecycleScoreTrainer):
        """several plausible masks of an image, each from other random numbers (experimental)."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerRecycleScore":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

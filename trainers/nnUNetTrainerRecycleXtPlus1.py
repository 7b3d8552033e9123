"""Trainer: recycling x_{t+1} (Fu et al. 2024, eq. 6)."""

try:
    from nnunetv2_diffusion.training import DiffusionTrainer, RecycleXtPlus1

    class nnUNetTrainerRecycleXtPlus1(DiffusionTrainer):
        """recycling x_{t+1} (Fu et al. 2024, eq. 6)."""

        strategy = RecycleXtPlus1()

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerRecycleXtPlus1":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

"""Trainer: recycling x_T (Fu et al. 2024, eq. 5), the proposed strategy."""

try:
    from nnunetv2_diffusion.training import DiffusionTrainer, RecycleXT

    class nnUNetTrainerRecycleXT(DiffusionTrainer):
        """recycling x_T (Fu et al. 2024, eq. 5), the proposed strategy."""

        strategy = RecycleXT()

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerRecycleXT":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

"""Trainer: self-conditioning on x_t (Chen et al. 2022; Fu et al. 2024, eq. 7)."""

try:
    from nnunetv2_diffusion.training import DiffusionTrainer, SelfConditionXt

    class nnUNetTrainerSelfCondXt(DiffusionTrainer):
        """self-conditioning on x_t (Chen et al. 2022; Fu et al. 2024, eq. 7)."""

        strategy = SelfConditionXt()

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerSelfCondXt":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

"""Trainer: self-conditioning on x_{t+1} (Watson et al. 2023; Fu et al. 2024, eq. 8, as in the equation)."""

try:
    from nnunetv2_diffusion.training import DiffusionTrainer, SelfConditionXtPlus1

    class nnUNetTrainerSelfCondXtPlus1(DiffusionTrainer):
        """self-conditioning on x_{t+1} (Watson et al. 2023; Fu et al. 2024, eq. 8, as in the equation)."""

        strategy = SelfConditionXtPlus1()

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerSelfCondXtPlus1":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

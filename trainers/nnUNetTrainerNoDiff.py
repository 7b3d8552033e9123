"""Trainer: control without diffusion, same network and recipe (Fu et al. 2024, section 5.3)."""

try:
    from nnunetv2_diffusion.training import NoDiffTrainer

    class nnUNetTrainerNoDiff(NoDiffTrainer):
        """control without diffusion, same network and recipe (Fu et al. 2024, section 5.3)."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerNoDiff":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

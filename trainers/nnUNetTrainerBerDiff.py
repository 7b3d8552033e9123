"""Trainer: BerDiff (Chen et al. 2023): Bernoulli diffusion from fair coins, conditioned on the image."""

try:
    from nnunetv2_diffusion.methods.berdiff import BerDiffTrainer

    class nnUNetTrainerBerDiff(BerDiffTrainer):
        """BerDiff (Chen et al. 2023): Bernoulli diffusion from fair coins, conditioned on the image."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerBerDiff":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

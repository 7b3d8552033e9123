"""Trainer: standard denoising of the noised ground truth (Fu et al. 2024, eq. 4)."""

try:
    from nnunetv2_diffusion.training import DiffusionTrainer, Standard

    class nnUNetTrainerDiffSeg(DiffusionTrainer):
        """standard denoising of the noised ground truth (Fu et al. 2024, eq. 4)."""

        strategy = Standard()

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerDiffSeg":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

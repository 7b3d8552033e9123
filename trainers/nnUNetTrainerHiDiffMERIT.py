"""Trainer: HiDiff (Chen et al. 2024) with MERIT as segmentor, 2d only."""

try:
    from nnunetv2_diffusion.methods.hidiff_merit import MeritTrainer

    class nnUNetTrainerHiDiffMERIT(MeritTrainer):
        """HiDiff (Chen et al. 2024) with MERIT as segmentor, 2d only."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerHiDiffMERIT":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

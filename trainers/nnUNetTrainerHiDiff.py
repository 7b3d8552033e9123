"""Trainer: HiDiff (Chen et al. 2024): nnU-Net's own network and a binarised diffusion refiner of its mask."""

try:
    from nnunetv2_diffusion.methods.hidiff import HiDiffTrainer

    class nnUNetTrainerHiDiff(HiDiffTrainer):
        """HiDiff (Chen et al. 2024): nnU-Net's own network and a binarised diffusion refiner of its mask."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerHiDiff":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

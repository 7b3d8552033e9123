"""Trainer: rectified flow (Liu et al. 2023): a straight line from noise to mask, in x0-parametrisation."""

try:
    from nnunetv2_diffusion.methods.flow import FlowTrainer

    class nnUNetTrainerFlow(FlowTrainer):
        """rectified flow (Liu et al. 2023): a straight line from noise to mask, in x0-parametrisation."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetTrainerFlow":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

"""Planner: nnU-Net's residual encoder planner L (24 GB), for the diffusion trainers."""

try:
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        nnUNetPlannerResEncL,
    )

    from nnunetv2_diffusion.planning.planner import DiffusionPlannerMixin

    class nnUNetPlannerDiffusionResEncL(
        DiffusionPlannerMixin, nnUNetPlannerResEncL, plans_name="nnUNetDiffusionResEncLPlans"
    ):
        """nnU-Net's residual encoder planner L (24 GB), for the diffusion trainers."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetPlannerDiffusionResEncL":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

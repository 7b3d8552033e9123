"""Planner: nnU-Net's residual encoder planner XL (40 GB), for the diffusion trainers."""

try:
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        nnUNetPlannerResEncXL,
    )

    from nnunetv2_diffusion.planning.planner import DiffusionPlannerMixin

    class nnUNetPlannerDiffusionResEncXL(
        DiffusionPlannerMixin, nnUNetPlannerResEncXL, plans_name="nnUNetDiffusionResEncXLPlans"
    ):
        """nnU-Net's residual encoder planner XL (40 GB), for the diffusion trainers."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetPlannerDiffusionResEncXL":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

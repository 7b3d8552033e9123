"""Planner: nnU-Net's residual encoder planner M (8 GB), for the diffusion trainers."""

try:
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        nnUNetPlannerResEncM,
    )

    from nnunetv2_diffusion.planning.planner import DiffusionPlannerMixin

    class nnUNetPlannerDiffusionResEncM(
        DiffusionPlannerMixin, nnUNetPlannerResEncM, plans_name="nnUNetDiffusionResEncMPlans"
    ):
        """nnU-Net's residual encoder planner M (8 GB), for the diffusion trainers."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetPlannerDiffusionResEncM":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

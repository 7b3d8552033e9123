"""Planner: nnU-Net's residual encoder planner XL (40 GB), for HiDiff's trainer, which holds two networks."""

try:
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        nnUNetPlannerResEncXL,
    )

    from nnunetv2_diffusion.planning.planner import HiDiffPlannerMixin

    class nnUNetPlannerHiDiffResEncXL(
        HiDiffPlannerMixin, nnUNetPlannerResEncXL, plans_name="nnUNetHiDiffResEncXLPlans"
    ):
        """nnU-Net's residual encoder planner XL (40 GB), for HiDiff's trainer, which holds two networks."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetPlannerHiDiffResEncXL":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

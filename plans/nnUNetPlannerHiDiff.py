"""Planner: nnU-Net's default planner (PlainConvUNet), for HiDiff's trainer, which holds two networks."""

try:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
        ExperimentPlanner,
    )

    from nnunetv2_diffusion.planning.planner import HiDiffPlannerMixin

    class nnUNetPlannerHiDiff(HiDiffPlannerMixin, ExperimentPlanner, plans_name="nnUNetHiDiffPlans"):
        """nnU-Net's default planner (PlainConvUNet), for HiDiff's trainer, which holds two networks."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetPlannerHiDiff":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

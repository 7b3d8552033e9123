"""Planner: nnU-Net's default planner (PlainConvUNet), for the diffusion trainers."""

try:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
        ExperimentPlanner,
    )

    from nnunetv2_diffusion.planning.planner import DiffusionPlannerMixin

    class nnUNetPlannerDiffusion(DiffusionPlannerMixin, ExperimentPlanner, plans_name="nnUNetDiffusionPlans"):
        """nnU-Net's default planner (PlainConvUNet), for the diffusion trainers."""

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetPlannerDiffusion":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

"""Planner: as nnU-Net's default planner, with the diffusion settings written into the plans."""

try:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    from nnunetv2_diffusion.planning.planner import DiffusionPlannerMixin

    class nnUNetPlannerDiffusion(DiffusionPlannerMixin, ExperimentPlanner):
        """As nnU-Net's default planner (PlainConvUNet), with the diffusion settings written into the plans."""

        def __init__(
            self,
            dataset_name_or_id: str | int,
            gpu_memory_target_in_gb: float = 8,
            preprocessor_name: str = "DefaultPreprocessor",
            plans_name: str = "nnUNetDiffusionPlans",
            overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
            suppress_transpose: bool = False,
        ):
            super().__init__(
                dataset_name_or_id,
                gpu_memory_target_in_gb,
                preprocessor_name,
                plans_name,
                overwrite_target_spacing,
                suppress_transpose,
            )

except Exception as error:  # nnU-Net imports every file here while it searches: none may stop it
    reason = error

    def __getattr__(name: str) -> None:
        if name == "nnUNetPlannerDiffusion":
            raise RuntimeError(f"{name} cannot be used: {reason}") from reason
        raise AttributeError(name)

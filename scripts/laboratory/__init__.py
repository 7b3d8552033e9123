"""What runs from a checkout and is not installed: demo, studies, benchmarks and converters of data sets.

``scripts/`` holds the commands. The laboratory imports the plug-in (``nnunetv2_diffusion``), never the other way round.
"""

"""Words and limits that several sections share."""

# as ``diffusion`` knows them, which is not imported here: torch takes seconds
SAMPLERS = ("ddpm", "ddim")
SPACINGS = ("linspace", "trailing")
# sections that others name
GAUSSIAN, HIDIFF = "gaussian", "hidiff"
MOST_SAMPLES = 10_000
MOST_EPOCHS = 100_000
LARGEST_SEED = 2**63 - 1

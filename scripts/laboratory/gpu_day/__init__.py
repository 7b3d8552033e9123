"""What a machine with a GPU, lent for half an hour, is used for; ``scripts/gpu_day`` is the command."""

"""What a training step and a prediction cost next to stock nnU-Net, measured side by side in one process.

``scripts/benchmark`` is the command. Networks and optimisers are those that nnU-Net itself builds from plans; no data
set is needed.
"""

"""Recycling on a toy network, without nnU-Net: eight noisy squares, two classes, a few seconds on a CPU."""

import torch

from nnunetv2_diffusion.diffusion import GaussianDiffusion, linear_beta_schedule
from nnunetv2_diffusion.training.strategies import RecycleXT

torch.manual_seed(0)
square = torch.zeros(8, 1, 16, 16)
square[:, :, 4:12, 4:12] = 1
truth, image = torch.cat([1 - square, square], 1), square + 0.5 * torch.randn_like(square)

# process, network, training
process = GaussianDiffusion(linear_beta_schedule(1001))
network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv2d(32, 2, 1))
optimizer = torch.optim.Adam(network.parameters(), 1e-2)


def probabilities(x, t, samples=None):  # of image and noisy mask; a toy is not told the time t
    return network(torch.cat([image, x.clamp(-1, 1)], 1)).softmax(1)


for _ in range(100):
    t = torch.randint(process.num_timesteps - 1, (8,))
    x_t = RecycleXT()(torch.no_grad()(probabilities), process, 2 * truth - 1, t).x_t
    loss = -(truth * probabilities(x_t, t).log()).sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# sampling: five DDIM steps from noise to a mask
chain, x = process.respace(5), torch.randn_like(truth)
for step in (4, 3, 2, 1, 0):
    t = torch.full((8,), step)
    x = chain.ddim_step(2 * probabilities(x, chain.timestep_map[t]).detach() - 1, x, t)

mask = x.argmax(1)
dice = (2 * (mask * truth[:, 1]).sum() / (mask.sum() + truth[:, 1].sum())).item()
print(f"loss {loss.item():.3f}, Dice of the sampled masks {dice:.3f}")

"""A few training steps on one made-up batch."""

import torch


def make_batch(trainer):
    """Two images whose bright half is class 1 and whose darkest corner is class 2."""
    torch.manual_seed(0)
    shape = tuple(trainer.configuration_manager.patch_size)
    truth = torch.zeros(2, 1, *shape, dtype=torch.int16)
    truth[:, :, : shape[0] // 2] = 1
    truth[:, :, shape[0] // 2 :, : shape[1] // 3] = 2
    image = torch.randn(2, 1, *shape) * 0.3 + truth
    scales = trainer._get_deep_supervision_scales()
    if not scales:
        return {"data": image, "target": truth}
    sizes = [[round(n * s) for n, s in zip(shape, scale, strict=True)] for scale in scales]
    coarse = [torch.nn.functional.interpolate(truth.float(), size).short() for size in sizes]
    return {"data": image, "target": coarse}


def learn(trainer, steps):
    """Losses of so many steps on one batch."""
    batch = make_batch(trainer)
    trainer.network.train()
    return [float(trainer.train_step(batch)["loss"]) for _ in range(steps)]

"""The page docs/how-to/add-a-strategy.md: its code is a file that nnU-Net finds, and trains."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunetv2_diffusion.diffusion import GaussianDiffusion, linear_beta_schedule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "add-a-strategy.md"


@pytest.fixture
def module(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (name,) = re.findall(r"Save the code as `(\w+)\.py`", PAGE.read_text(encoding="utf-8"))
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nnunet_finds_the_trainer_by_its_name(module):
    file = Path(module.__file__)
    found = recursive_find_python_class(str(file.parent), file.stem, None)  # as nnU-Net does for nnUNet_extTrainer
    assert found.strategy.uses_next_step


def test_the_trainer_takes_a_step(make, module):
    trainer = make(module.nnUNetTrainerRecycleAny)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    batch = {"data": torch.randn(2, 1, 8, 12, 8), "target": torch.randint(0, 2, (2, 1, 8, 12, 8)).float()}
    output = trainer.train_step(batch)
    assert torch.isfinite(torch.as_tensor(output["loss"]))
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))


def test_the_first_pass_is_always_at_a_noisier_step(module):
    process, seen = GaussianDiffusion(linear_beta_schedule(5)), []
    t = torch.arange(4).repeat(200)

    def predict(x, s):
        seen.append(s)
        return torch.full_like(x, 0.5)

    last = module.RecycleAny()(predict, process, torch.ones(800, 2, 1, 1), t)
    assert last.x_t.shape == (800, 2, 1, 1)
    assert all(set(seen[0][t == k].tolist()) == set(range(k + 1, 5)) for k in range(4))

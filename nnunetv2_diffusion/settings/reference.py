"""The page of all settings, made from the dataclasses: ``python -m nnunetv2_diffusion.settings``."""

import json
from dataclasses import fields

from nnunetv2_diffusion.settings.schema import Settings, documented
from nnunetv2_diffusion.settings.sections import SUBSECTIONS, DiffusionSettings

HEAD = """# Settings

This page is made from the code: `python -m nnunetv2_diffusion.settings > docs/settings.md`.

All settings are optional. They stand in nnU-Net's plans, in a section `diffusion` of a configuration:

```json
"configurations": {"3d_fullres": {"diffusion": {"num_epochs": 300, "gaussian": {"steps": 5}}}}
```

`nnunetv2_diffusion plan -d ID --set num_epochs=300 gaussian.steps=5` writes such plans, `--show` prints every setting
and where it comes from ([planning.md](planning.md)). An unknown key or a value that cannot be used is refused before
anything is written. A setting that the chosen trainer does not read is named in the log of the training.

For one prediction the environment variables `nnUNet_diffusion_steps`, `nnUNet_diffusion_sampler`,
`nnUNet_diffusion_samples` and `nnUNet_diffusion_seed` take precedence; steps and sampler are those of the chosen
trainer's section.

Plans of version 0.1, which had the settings of section `gaussian` beside the common ones, are read as they are, with
a warning that names old and new keys. A setting of that version that is not on this page still acts if it has another
value than its default.
"""
COMMON = "Settings of all trainers"


def settings_table(cls: type[Settings] = DiffusionSettings) -> str:
    """All documented settings of a section as a Markdown table."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for f in documented(cls):
        default = json.dumps(f.default)  # a tuple as a list
        choices = f.metadata["choices"]
        named = ", ".join(str(choice) for choice in choices if choice is not None)
        rows.append(f"| `{f.name}` | {default} | {f.metadata['doc']}{f' ({named})' if named else ''} |")
    return "\n".join(rows)


def settings_page() -> str:
    """The whole page as Markdown."""
    docs = {f.name: f.metadata["doc"] for f in fields(DiffusionSettings)}
    parts = [HEAD, f"## {COMMON}\n\n{settings_table()}\n"]
    for name, cls in SUBSECTIONS.items():
        parts.append(f"## Section `{name}`\n\nFor {docs[name]}.\n\n{settings_table(cls)}\n")
    return "\n".join(parts)

"""A warm start is the source network: equal logits through nnU-Net's own loader, and nothing written otherwise."""

import json
from copy import deepcopy

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.checkpoints import CheckpointError, build_network, load_checkpoint_file
from nnunetv2_diffusion.cli import main
from nnunetv2_diffusion.training.pretrained import check_pretrained_weights

LABELS = {"background": 0, "outer": 1, "inner": 2}
RECYCLING = ("DiffSeg", "NoDiff", "RecycleScore", "RecycleXT", "RecycleXtPlus1", "SelfCondXt", "SelfCondXtPlus1")
DATASET = "Dataset777_Warm"


def architecture(kind="PlainConvUNet", dims=3, features=(4, 8, 8)):
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": len(features),
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * len(features),
            "strides": [[1] * dims, *[[2] * dims] * (len(features) - 1)],
            blocks: [1] * len(features),
            "n_conv_per_stage_decoder": [1] * (len(features) - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(network=None, **diffusion):
    """Plans with one configuration, "only"."""
    network = network or architecture()
    dims = len(network["arch_kwargs"]["kernel_sizes"][0])
    settings = {"transformer_heads": 2, "steps": 2, "hidiff": {"refiner_width": 4, "steps": 2}}
    return {
        "dataset_name": DATASET,
        "plans_name": "small",
        "label_manager": "LabelManager",
        "configurations": {
            "only": {
                "patch_size": [8] * dims,
                "batch_size": 2,
                "spacing": [1.0] * dims,
                "normalization_schemes": ["ZScoreNormalization"] * 2,
                "architecture": network,
                "diffusion": {**settings, **diffusion},
            }
        },
    }


def make_dataset(labels=LABELS, channels=2, **more):
    return {"channel_names": {str(c): "MR" for c in range(channels)}, "labels": labels, "file_ending": ".nii", **more}


def source_network(plans, dataset):
    """nnU-Net's own network, far from its initialisation, also in biases and affine parameters."""
    manager = PlansManager(plans)
    network = build_network("nnUNetTrainer", manager, manager.get_configuration("only"), dataset).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def save_checkpoint(file, network, plans, dataset, trainer="nnUNetTrainer"):
    arguments = {"plans": plans, "configuration": "only", "fold": 0, "dataset_json": dataset}
    torch.save(
        {"network_weights": network.state_dict(), "trainer_name": trainer, "init_args": arguments},
        file,
    )
    return file


class Site:
    """A preprocessed data set and a checkpoint of nnU-Net's own network, and the verb on them."""

    def __init__(self, folder, monkeypatch):
        torch.manual_seed(0)
        self.folder, self.preprocessed = folder, folder / "preprocessed" / DATASET
        self.preprocessed.mkdir(parents=True)
        monkeypatch.setenv("nnUNet_preprocessed", str(folder / "preprocessed"))
        self.plans, self.dataset = make_plans(), make_dataset()
        self.checkpoint, self.output = folder / "stock.pth", folder / "warm.pth"

    def train(self, plans=None, dataset=None):
        """The source: by default with the plans and data set of the target."""
        plans, dataset = plans or self.plans, dataset or self.dataset
        self.source = source_network(plans, dataset)
        save_checkpoint(self.checkpoint, self.source, plans, dataset)
        return self

    def run(self, trainer="nnUNetTrainerRecycleXT", *options):
        (self.preprocessed / "small.json").write_text(json.dumps(self.plans))
        (self.preprocessed / "dataset.json").write_text(json.dumps(self.dataset))
        files = ("--from", str(self.checkpoint), "-o", str(self.output))
        return main(["warm-start", *files, "-d", DATASET, "-c", "only", "-p", "small", "-tr", trainer, *options])

    def fresh(self, trainer="nnUNetTrainerRecycleXT"):
        """The network that nnU-Net would train, in eval mode."""
        manager = PlansManager(self.plans)
        return build_network(trainer, manager, manager.get_configuration("only"), self.dataset).eval()

    def loaded(self, trainer="nnUNetTrainerRecycleXT"):
        """The same after nnU-Net's ``-pretrained_weights``."""
        network = self.fresh(trainer)
        load_pretrained_weights(network, str(self.output))
        return network


@pytest.fixture
def site(tmp_path, monkeypatch):
    return Site(tmp_path, monkeypatch)


def assert_same_logits(network, source, dims=3):
    """With any noisy mask at any time, or any code, and of the prediction."""
    image = torch.randn(2, 2, *[8] * dims)
    with torch.inference_mode():
        expected = source(image)
        if network.latent is not None:
            found = network(image, 3 * torch.randn(2, network.latent_channels))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        elif network.process is None:
            torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
        if network.process is None:
            found = network.probabilities(network(image))
            torch.testing.assert_close(found, network.probabilities(expected), rtol=1e-3, atol=1e-5)
            return
        x_t = 3 * torch.randn(2, network.mask_channels, *[8] * dims)
        for t in (0, network.process.num_timesteps - 1):
            found = network(image, x_t, torch.tensor([t, t]))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if network.self_conditioning:
            found = network(image, x_t, torch.tensor([1, 1]), torch.rand_like(x_t))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found = network.probabilities(network(image))
        torch.testing.assert_close(found, network.probabilities(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("trainer", RECYCLING)
def test_logits_are_those_of_the_source_whatever_the_strategy(site, trainer, kind):
    trainer = f"nnUNetTrainer{trainer}"
    site.plans = make_plans(architecture(kind))
    site.train()
    assert site.run(trainer) == 0
    network = site.loaded(trainer)
    assert network.warm_heads is True
    assert_same_logits(network, site.source)


@pytest.mark.parametrize("settings", [{"mask_encoding": "analog-bits"}, {"transformer_layers": 0}])
def test_logits_are_those_of_the_source_whatever_the_settings_and_dimensions(site, settings):
    site.plans = make_plans(architecture(dims=2), **settings)
    site.train()
    assert site.run() == 0
    assert_same_logits(site.loaded(), site.source, dims=2)


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_hidiffs_segmentor_is_the_source_and_its_refiner_the_files(site, kind):
    site.plans = make_plans(architecture(kind))
    site.train()
    assert site.run("nnUNetTrainerHiDiff") == 0
    network, image = site.loaded("nnUNetTrainerHiDiff"), torch.randn(2, 2, 8, 8, 8)
    network.sampling = None
    with torch.inference_mode():
        torch.testing.assert_close(network.segmentor(image).logits, site.source(image))
        torch.testing.assert_close(network(image), site.source(image))
    weights = load_checkpoint_file(site.output)["network_weights"]
    refiner = network.refiner.state_dict()
    assert refiner
    assert all(torch.equal(w, weights[f"refiner.{key}"]) for key, w in refiner.items())


def test_the_training_of_the_source_goes_on_from_its_weights(site):
    """Every parameter of the warm network gets the gradient of the source's, where both have it."""
    site.train()
    site.run()
    network, image = site.loaded(), torch.randn(2, 2, 8, 8, 8)
    network(image, torch.randn(2, network.mask_channels, 8, 8, 8), torch.tensor([3, 5])).square().sum().backward()
    site.source(image).square().sum().backward()
    expected = {name: p.grad for name, p in site.source.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in network.named_parameters()}
    tolerance = 1e-5 * max(float(gradient.abs().max()) for gradient in expected.values())
    assert len(expected) > 20
    for name, gradient in expected.items():
        same = found[name][:, : gradient.shape[1]] if gradient.ndim == 5 else found[name]
        torch.testing.assert_close(same, gradient, rtol=1e-3, atol=tolerance)


def test_the_file_holds_each_weight_once_and_only_tensors_and_plain_data(site):
    site.train()
    site.run()
    content = load_checkpoint_file(site.output)
    network = site.fresh()
    network.load_state_dict(content["network_weights"])
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    assert_same_logits(network, site.source)
    overhead = 2000 * len(content["network_weights"])  # names and headers
    assert site.output.stat().st_size < size + overhead
    assert content["warm_start"] == {
        "trainer": "nnUNetTrainerRecycleXT",
        "heads": "copied",
        "from": "nnUNetTrainer",
        "copied": list(LABELS),
        "fresh": [],
        "parts": {"time": "new", "transformer": "new"},
    }


def heads_of(network):
    return [w.clone() for key, w in network.state_dict().items() if ".seg_layers." in key]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_body_is_the_sources_and_heads_stay(site, network, before):
    assert network.warm_heads is False
    assert same(heads_of(network), before)
    body = {key: w for key, w in site.source.state_dict().items() if ".seg_layers." not in key}
    found = network.state_dict()
    assert all(torch.equal(found[key][:, : w.shape[1]] if w.ndim == 5 else found[key], w) for key, w in body.items())


def load_into(site, network):
    before = heads_of(network)
    load_pretrained_weights(network, str(site.output))
    return before


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"background": 0, "one": 1}, "the checkpoint segments 2 classes or regions, the data set has 3"),
        ({"background": 0, "one": 1, "two": 2}, "the labels differ"),
        (
            {"background": 0, "one": 1, "two": 2, "three": 3},
            "the checkpoint segments 4 classes or regions, the data set has 3",
        ),
    ],
)
def test_heads_for_other_labels_are_fresh_and_all_else_is_copied(site, capsys, labels, reason):
    site.train(dataset=make_dataset(labels))
    assert site.run() == 0
    assert f"segmentation heads: fresh, {reason}" in capsys.readouterr().out
    network = site.fresh()
    assert_body_is_the_sources_and_heads_stay(site, network, load_into(site, network))


def test_heads_are_as_asked_for(site):
    site.train(dataset=make_dataset({"background": 0, "one": 1, "two": 2}))
    assert site.run("nnUNetTrainerRecycleXT", "--heads", "copy") == 0
    assert_same_logits(site.loaded(), site.source)
    site.output.unlink()
    site.train()
    assert site.run("nnUNetTrainerRecycleXT", "--heads", "fresh") == 0
    network = site.fresh()
    assert_body_is_the_sources_and_heads_stay(site, network, load_into(site, network))


def test_an_ignore_label_has_no_head(site):
    site.train(dataset=make_dataset({**LABELS, "ignore": 3}))
    assert site.run() == 0
    assert site.loaded().warm_heads is True


def test_regions_stay_regions(site):
    site.dataset = make_dataset({"background": 0, "whole": [1, 2], "inner": 2}, regions_class_order=[1, 2])
    site.train()
    assert site.run() == 0
    network = site.loaded()
    assert network.sigmoid
    assert_same_logits(network, site.source)


def test_a_checkpoint_that_is_no_warm_start_loads_as_ever_without_its_heads(site):
    other = site.fresh()
    save_checkpoint(site.output, other, site.plans, site.dataset, "nnUNetTrainerRecycleXT")
    network = site.fresh()
    before = load_into(site, network)
    assert network.warm_heads is None
    assert same(heads_of(network), before)
    assert not same(heads_of(other), before)


def refused(site, capsys, *arguments):
    """The message of a call that fails and writes nothing."""
    assert site.run(*arguments) == 1
    captured = capsys.readouterr()
    assert not site.output.exists()
    assert not list(site.folder.glob("*.part"))
    assert captured.err.startswith("nnunetv2_diffusion warm-start: ")
    return captured.err


def test_another_topology_is_told_in_ten_lines_what_was_planned_first(site, capsys):
    plans = make_plans(architecture(features=(4, 8, 16)))
    site.train(plans)
    message = refused(site, capsys)
    lines = message.splitlines()
    assert len(lines) <= 10
    assert "features_per_stage: found [4, 8, 16], expected [4, 8, 8]" in lines[1]
    expected = nnUNetTrainer.build_network_architecture(*_network_arguments(site)).state_dict()
    found = site.source.state_dict()
    wrong = {key for key in expected if expected[key].shape != found[key].shape}
    wrong = {key for key in wrong if ".all_modules." not in key and not key.startswith("decoder.encoder.")}
    assert f"{len(wrong)} of " in lines[-1]
    assert message.count(": found (") == 1


def _network_arguments(site):
    manager = PlansManager(site.plans)
    return manager, manager.get_configuration("only"), 2, 3, False


def test_more_stages_are_told_in_ten_lines(site, capsys):
    site.train(make_plans(architecture(features=(4, 8, 8, 8))))
    message = refused(site, capsys)
    assert len(message.splitlines()) <= 10
    assert "n_stages: found 4, expected 3" in message


def _change(kwargs, **changes):
    network = architecture()
    network["arch_kwargs"].update(kwargs, **changes)
    return make_plans(network)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nonlin": "torch.nn.ReLU"}, "nonlin: found torch.nn.ReLU, expected torch.nn.LeakyReLU"),
        ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, "norm_op_kwargs: found {'eps': 0.001"),
        ({"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}, "normalisation: found batch norm"),
        ({"conv_bias": False}, "encoder.stages.0.0.convs.0.conv.bias: found none, expected (4,)"),
    ],
)
def test_what_would_change_the_logits_is_named(site, capsys, change, expected):
    site.train(_change(change))
    assert expected in refused(site, capsys)


def test_other_input_channels_are_named(site, capsys):
    site.train(dataset=make_dataset(channels=1))
    message = refused(site, capsys)
    assert "input channels: found 1, expected 2" in message


def test_heads_of_another_size_cannot_be_copied(site, capsys):
    site.train(dataset=make_dataset({"background": 0, "one": 1}))
    message = refused(site, capsys, "nnUNetTrainerRecycleXT", "--heads", "copy")
    assert "the checkpoint segments 2 classes or regions, the data set has 3" in message


def test_differences_that_do_not_change_the_logits_are_noted(site, capsys):
    plans = deepcopy(site.plans)
    plans["configurations"]["only"].update(spacing=[2.0, 1.0, 1.0], patch_size=[16, 16, 16])
    site.train(plans)
    assert site.run() == 0
    printed = capsys.readouterr().out
    assert "note: spacing was [2.0, 1.0, 1.0], is [1.0, 1.0, 1.0]" in printed
    assert "note: patch_size was [16, 16, 16], is [8, 8, 8]" in printed
    assert "normalization_schemes" not in printed
    assert f"-tr nnUNetTrainerRecycleXT -p small -pretrained_weights {site.output}" in printed


def test_a_checkpoint_without_its_plans_is_compared_by_its_weights(site, capsys):
    site.train()
    torch.save({"network_weights": site.source.state_dict()}, site.checkpoint)
    assert site.run() == 0
    assert "does not tell its plans" in capsys.readouterr().out
    assert_same_logits(site.loaded(), site.source)


def test_nothing_that_exists_is_overwritten(site, capsys):
    site.train()
    site.output.write_text("mine")
    assert site.run() == 1
    assert "exists; it is not overwritten" in capsys.readouterr().err
    assert site.output.read_text() == "mine"


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerBaseline"])
def test_trainers_of_nnunets_own_network_take_the_checkpoint_itself(site, capsys, trainer):
    site.train()
    assert "take the checkpoint itself as -pretrained_weights" in refused(site, capsys, trainer)


EVERY = (*RECYCLING, "HiDiff")


def trained(site, trainer, dataset=None):
    """A checkpoint of one of our trainers, far from its initialisation."""
    dataset = dataset or site.dataset
    manager = PlansManager(site.plans)
    network = build_network(trainer, manager, manager.get_configuration("only"), dataset).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_checkpoint(site.checkpoint, network, site.plans, dataset, trainer)
    return network


@pytest.mark.parametrize("trainer", EVERY)
def test_the_same_trainer_and_labels_give_the_same_bits(site, trainer):
    trainer = f"nnUNetTrainer{trainer}"
    source = trained(site, trainer)
    assert site.run(trainer) == 0
    network = site.loaded(trainer)
    assert network.warm_heads is True
    found = network.state_dict()
    assert all(torch.equal(found[key], w) for key, w in source.state_dict().items())


REORDERED = {"background": 0, "inner": 1, "outer": 2}


def test_logits_follow_the_names_of_reordered_labels(site):
    source = trained(site, "nnUNetTrainerSelfCondXt", make_dataset(REORDERED))
    assert site.run("nnUNetTrainerSelfCondXt") == 0
    network = site.loaded("nnUNetTrainerSelfCondXt")
    image, t, order = torch.randn(2, 2, 8, 8, 8), torch.tensor([3, 5]), [0, 2, 1]
    x_t, estimate = torch.randn(2, 3, 8, 8, 8), torch.rand(2, 3, 8, 8, 8)
    with torch.inference_mode():
        expected = source(image, x_t, t, estimate)[:, order]
        found = network(image, x_t[:, order], t, estimate[:, order])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, expected[:, order])


def test_the_refiner_follows_the_names_of_reordered_labels(site):
    source = trained(site, "nnUNetTrainerHiDiff", make_dataset(REORDERED))
    assert site.run("nnUNetTrainerHiDiff") == 0
    network, order = site.loaded("nnUNetTrainerHiDiff"), [0, 2, 1]
    image, y_t, prior = torch.randn(2, 2, 8, 8, 8), torch.rand(2, 3, 8, 8, 8).round(), torch.rand(2, 3, 8, 8, 8)
    with torch.inference_mode():
        features, t = source.segmentor(image).features, torch.tensor([1, 2])
        expected = source.estimate_noise(image, y_t, prior, t, features)[:, order]
        found = network.estimate_noise(image, y_t[:, order], prior[:, order], t, network.segmentor(image).features)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_labels_that_agree_are_copied_and_others_fresh(site, capsys):
    source = trained(site, "nnUNetTrainerRecycleXT", make_dataset({"background": 0, "other": 1, "outer": 2, "x": 3}))
    assert site.run() == 0
    assert "labels: copied background, outer; fresh inner" in capsys.readouterr().out
    network = site.loaded()
    assert network.warm_heads is False
    there, here = source.state_dict(), network.state_dict()
    for key in ("decoder.seg_layers.0.weight", "decoder.seg_layers.1.bias"):
        assert torch.equal(here[key][1], there[key][2])
        assert not any(torch.equal(here[key][2], w) for w in there[key])
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(here[stem][:, :4], there[stem][:, [0, 1, 2, 4]])
    assert not here[stem][:, 4].any()
    assert load_checkpoint_file(site.output)["warm_start"]["fresh"] == ["inner"]


@pytest.mark.parametrize("names", [("background", "outer", "inner"), ("background", "inner", "outer")])
def test_analog_bits_are_copied_for_equal_labels_alone(site, names):
    site.plans = make_plans(mask_encoding="analog-bits")
    labels = {name: i for i, name in enumerate(names)}
    source = trained(site, "nnUNetTrainerRecycleXT", make_dataset(labels))
    assert site.run() == 0
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    there, here = source.state_dict()[stem], site.loaded().state_dict()[stem]
    assert torch.equal(here[:, :2], there[:, :2])
    assert torch.equal(here[:, 2:], there[:, 2:] if labels == LABELS else torch.zeros_like(there[:, 2:]))


def test_image_channels_are_copied_by_name(site, capsys):
    site.dataset = {**make_dataset(), "channel_names": {"0": "T2", "1": "T1"}}
    source = trained(site, "nnUNetTrainerRecycleXT", {**make_dataset(channels=1), "channel_names": {"0": "T1"}})
    assert site.run() == 0
    assert "image channels: copied T1; fresh T2" in capsys.readouterr().out
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    there, here = source.state_dict()[stem], site.loaded().state_dict()[stem]
    assert torch.equal(here[:, 1:], there)


def test_a_network_goes_from_one_family_to_the_other(site, capsys):
    source = trained(site, "nnUNetTrainerHiDiff")
    assert site.run() == 0
    assert "refiner of nnUNetTrainerHiDiff have no place" in capsys.readouterr().out
    image, network = torch.randn(2, 2, 8, 8, 8), site.loaded()
    with torch.inference_mode():
        found = network(image, torch.randn(2, 3, 8, 8, 8), torch.tensor([1, 2]))
        torch.testing.assert_close(found, source.segmentor(image).logits, rtol=1e-4, atol=1e-5)
    site.output.unlink()
    trained(site, "nnUNetTrainerRecycleXT")
    assert site.run("nnUNetTrainerHiDiff") == 0
    assert "note: 3 input channels for masks are left out" in capsys.readouterr().out


class Training:
    """What ``check_pretrained_weights`` asks of a trainer."""

    def __init__(self, site):
        self.plans_manager, self.configuration_name = PlansManager(site.plans), "only"
        self.configuration_manager = self.plans_manager.get_configuration("only")
        self.dataset_json = site.dataset


@pytest.mark.parametrize(
    ("plans", "dataset", "first"),
    [
        (make_plans(architecture(features=(4, 8, 16))), None, "features_per_stage: found [4, 8, 16]"),
        (None, make_dataset({"background": 0, "one": 1}), "labels: found background, one, expected"),
        (None, make_dataset(channels=1), "input channels: found MR, expected MR, MR"),
    ],
)
def test_pretrained_weights_that_do_not_fit_are_told_in_three_lines(site, plans, dataset, first):
    plans, site.plans = site.plans, plans or site.plans
    trained(site, "nnUNetTrainerRecycleXT", dataset)
    site.plans = plans
    with pytest.raises(CheckpointError) as raised:
        check_pretrained_weights(Training(site), site.fresh(), site.checkpoint)
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert first in lines[0]
    assert lines[2].startswith(f"nnunetv2_diffusion warm-start --from {site.checkpoint} -d {DATASET} -c only")


def test_stock_weights_are_told_by_their_trainer_and_fitting_ones_pass(site):
    site.train()
    with pytest.raises(CheckpointError, match="trainer: found nnUNetTrainer without time, transformer"):
        check_pretrained_weights(Training(site), site.fresh(), site.checkpoint)
    trained(site, "nnUNetTrainerRecycleXT")
    check_pretrained_weights(Training(site), site.fresh(), site.checkpoint)


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda s: s.checkpoint.unlink(), "stock.pth: no such file, expected a checkpoint"),
        (lambda s: s.checkpoint.write_bytes(b"x"), "stock.pth: damaged"),
        (lambda s: s.plans["configurations"].update(other=s.plans["configurations"].pop("only")), "expected one of"),
        (lambda s: setattr(s, "output", s.folder / "none" / "warm.pth"), "none is no folder; make it"),
        (lambda s: s.plans["configurations"]["only"]["diffusion"].update(stepz=1), "stepz"),
    ],
)
def test_bad_input_is_named(site, capsys, break_it, expected):
    site.train()
    break_it(site)
    assert expected in refused(site, capsys)


def test_merit_goes_on_from_merit_alone(site, capsys):
    site.plans = make_plans(architecture(dims=2), hidiff={"refiner_width": 4, "steps": 2, "merit_variant": "nano"})
    site.plans["configurations"]["only"]["patch_size"] = [32, 32]
    source = trained(site, "nnUNetTrainerHiDiffMERIT", make_dataset(REORDERED))
    assert site.run("nnUNetTrainerHiDiffMERIT") == 0
    found, there = site.loaded("nnUNetTrainerHiDiffMERIT").state_dict(), source.state_dict()
    assert all(torch.equal(found[k], w) for k, w in there.items() if k.startswith("segmentor.scale"))
    assert torch.equal(found["segmentor.heads.3.weight"], there["segmentor.heads.3.weight"][[0, 2, 1]])
    site.output.unlink()
    site.train()
    assert "network: found U-Net (nnUNetTrainer), expected MERIT" in refused(site, capsys, "nnUNetTrainerHiDiffMERIT")

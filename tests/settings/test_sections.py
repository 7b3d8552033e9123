"""Behaviour of the settings in plans and of their overrides in the environment."""

import json
import re
from dataclasses import FrozenInstanceError

import pytest

from nnunetv2_diffusion import diffusion
from nnunetv2_diffusion import settings as settings_module
from nnunetv2_diffusion.settings import (
    ENVIRONMENT_KEYS,
    ENVIRONMENT_PREFIX,
    HIDIFF,
    SUBSECTIONS,
    DiffusionSettings,
    GaussianSettings,
    HiDiffSettings,
    SettingsError,
    apply_environment,
    documented,
    environment_overrides,
    flatten,
    merge_settings,
    parse_settings,
    read_assignments,
    read_settings,
    settings_table,
)
from nnunetv2_diffusion.settings.schema import setting

CLASSES = {"": DiffusionSettings, **SUBSECTIONS}
# a valid value of every documented setting that is not its default
OTHER = {
    "": {
        "num_epochs": 10,
        "num_iterations_per_epoch": 20,
        "num_val_iterations_per_epoch": 5,
        "recipe": "nnunet",
        "samples": 4,
        "seed": 9,
        "mask_encoding": "analog-bits",
        "time_conditioning": False,
        "transformer_layers": 2,
        "transformer_width": 1.0,
    },
    "gaussian": {
        "timesteps": 500,
        "betas": [2e-4, 0.03],
        "training_steps": 50,
        "time_sampling": "importance",
        "self_conditioning_probability": 0.25,
        "steps": 7,
        "sampler": "ddim",
        "step_spacing": "linspace",
    },
    "hidiff": {
        "steps": 0,
        "sampler": "ddpm",
        "timesteps": 20,
        "binarized": False,
        "cross_transformer": False,
        "refiner_width": 128,
        "refiner_norm": "batch",
        "noise_loss": "bce",
        "published": True,
        "collaborative": False,
        "learning_rate": 1e-3,
        "segmentor": "somewhere.pth",
        "pretraining_epochs": 4,
        "merit": "nano",
        "merit_weights": "timm",
    },
    "score": {"weight": 2.0, "latent_channels": 3, "steps": 5},
    "berdiff": {"steps": 3},
    "flow": {"steps": 3},
}
ALL = [(section, name) for section in OTHER for name in OTHER[section]]
FIELDS = {(section, f.name): f for section, cls in CLASSES.items() for f in documented(cls)}


def of_kind(kind: str) -> list[tuple[str, str]]:
    """Settings whose value is of a type, null excepted."""
    return [key for key, f in FIELDS.items() if re.fullmatch(rf"(<class ')?{kind}('>)?( \| None)?", str(f.type))]


OPTIONAL = [key for key, f in FIELDS.items() if "None" in str(f.type)]


def inside(section: str, name: str, value: object) -> dict:
    """The setting in its place."""
    return {section: {name: value}} if section else {name: value}


def read(settings: DiffusionSettings, section: str, name: str) -> object:
    return getattr(getattr(settings, section) if section else settings, name)


# --- what there is ---------------------------------------------------------------------------------------------------


def test_so_many_settings_and_no_more():
    """The goal is 30 names. Before another one is added: which one can go?"""
    assert len({name for _, name in FIELDS}) <= 32
    assert len(FIELDS) <= 38


def test_every_documented_setting_has_a_test_and_a_doc():
    assert set(ALL) == set(FIELDS)
    assert all(len(f.metadata["doc"]) > 5 for f in FIELDS.values())


def test_defaults():
    settings = DiffusionSettings()
    assert (settings.recipe, settings.samples, settings.seed, settings.time_conditioning) == ("paper", 1, 0, True)
    own = settings.gaussian
    assert (own.timesteps, own.betas, own.training_steps) == (1001, (1e-4, 0.02), None)
    assert (own.steps, own.sampler, own.step_spacing, own.time_sampling) == (None, "ddpm", "trailing", "uniform")
    own = settings.hidiff
    assert (own.timesteps, own.steps, own.sampler) == (10, 1, "ddim")
    assert (own.binarized, own.cross_transformer, own.noise_loss, own.collaborative) == (True, True, "focal", True)
    assert (own.focal_gamma, own.lambda_focal, own.lambda_diffusion) == (2, 1, 1)
    assert (own.learning_rate, own.segmentor_learning_rate, own.rate_alone) == (1e-4, 1e-4, 8e-4)
    assert (own.segmentor_trainer, own.segmentor_checkpoint) == ("nnUNetTrainer", None)


@pytest.mark.parametrize("configuration", [{}, {"diffusion": None}, {"diffusion": {}}, {"patch_size": [8, 8]}])
def test_plans_without_the_section_use_the_defaults(configuration):
    assert read_settings(configuration) == DiffusionSettings()


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(FrozenInstanceError):
        DiffusionSettings().seed = 3


@pytest.mark.parametrize(("section", "name"), ALL)
def test_every_setting_can_be_set_alone_and_survives_json(section, name, caplog):
    value = OTHER[section][name]
    settings = parse_settings(inside(section, name, value))
    found = read(settings, section, name)
    assert (list(found) if isinstance(found, tuple) else found) == value
    assert found != FIELDS[section, name].default
    assert parse_settings(json.loads(json.dumps(settings.to_dict()))) == settings
    assert not caplog.messages


def test_all_of_them_together_survive_json():
    content = {**OTHER[""], **{name: OTHER[name] for name in SUBSECTIONS}}
    assert parse_settings(content).to_dict() == content
    assert set(flatten(DiffusionSettings().to_dict())) == {".".join(filter(None, key)) for key in FIELDS}


def test_names_of_samplers_and_spacings_are_those_of_the_processes():
    assert (settings_module.SAMPLERS, settings_module.SPACINGS) == (diffusion.SAMPLERS, diffusion.SPACINGS)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_method_gives_its_steps_where_the_plans_say_none():
    assert GaussianSettings().with_steps(5).steps == 5
    assert GaussianSettings(steps=3).with_steps(5).steps == 3
    assert GaussianSettings(training_steps=2).with_steps(5).steps == 2


def test_chain_length_is_that_of_training():
    assert GaussianSettings().chain_length == 1001
    assert GaussianSettings(training_steps=5).chain_length == 5


# --- unknown keys and types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "key", "nearest"),
    [
        ({"gaussian": {"step": 5}}, "step", "'steps'"),
        ({"step": 5}, "step", "'gaussian.steps' or 'hidiff.steps'"),
        ({"time_steps": 5}, "time_steps", "'gaussian.timesteps' or 'hidiff.timesteps'"),
        ({"gaussian": {"recipe": "paper"}}, "recipe", "'diffusion.recipe'"),
        ({"hidiff": {"binarised": True}}, "binarised", "'binarized'"),
        ({"num_epoch": 5}, "num_epoch", "'num_epochs'"),
        ({"gausian": {"steps": 5}}, "gausian", "'gaussian'"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(content, key, nearest):
    with pytest.raises(SettingsError, match=rf"^some plans: unknown setting '{key}' in .*; did you mean {nearest}"):
        parse_settings(content, "some plans")


def test_an_unknown_key_like_no_other_is_named_with_all_known_ones():
    with pytest.raises(SettingsError, match="unknown setting 'xyzzy'") as error:
        parse_settings({"gaussian": {"xyzzy": 5}})
    assert all(name in str(error.value) for name in OTHER["gaussian"])


@pytest.mark.parametrize("section", [[], "steps", 5, [("steps", 5)]])
@pytest.mark.parametrize("name", ["", *SUBSECTIONS])
def test_a_section_that_is_no_mapping_is_named(section, name):
    with pytest.raises(SettingsError, match=rf"^plans: diffusion\.?{name} is .*, expected a mapping"):
        parse_settings({name: section} if name else section, "plans")


@pytest.mark.parametrize("value", [True, False, 3.0, "3", [3], {}])
@pytest.mark.parametrize(("section", "name"), of_kind("int"))
def test_an_integer_is_no_bool_no_float_and_no_text(section, name, value):
    expected = "int or null" if (section, name) in OPTIONAL else "int"
    with pytest.raises(SettingsError, match=rf"^here: .*{name} is .*, expected {expected}$"):
        parse_settings(inside(section, name, value), "here")


@pytest.mark.parametrize("value", [True, False, "0.5", [0.5], None])
@pytest.mark.parametrize(("section", "name"), of_kind("float"))
def test_a_float_is_no_bool_no_text_and_no_null(section, name, value):
    with pytest.raises(SettingsError, match=rf"{name} is .*, expected float$"):
        parse_settings(inside(section, name, value))


@pytest.mark.parametrize("value", [0, 1, "true", None])
@pytest.mark.parametrize(("section", "name"), of_kind("bool"))
def test_a_bool_is_no_number_and_no_text(section, name, value):
    with pytest.raises(SettingsError, match=rf"{name} is {value!r}, expected bool$"):
        parse_settings(inside(section, name, value))


@pytest.mark.parametrize(("section", "name"), [key for key, f in FIELDS.items() if f.metadata["choices"]])
@pytest.mark.parametrize("value", ["", "DDPM", "other"])
def test_a_choice_is_one_of_the_listed(section, name, value):
    choices = ", ".join(FIELDS[section, name].metadata["choices"])
    with pytest.raises(SettingsError, match=f"{name} is {value!r}, expected one of {choices}$"):
        parse_settings(inside(section, name, value))
    with pytest.raises(SettingsError, match=f"{name} is 1, expected str$"):
        parse_settings(inside(section, name, 1))


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_null_is_accepted_where_it_has_a_meaning_alone(section, name):
    if (section, name) in OPTIONAL:
        assert read(parse_settings(inside(section, name, None)), section, name) is None
    else:
        with pytest.raises(SettingsError, match=f"{name} is None, expected"):
            parse_settings(inside(section, name, None))


def test_a_whole_number_is_a_float():
    assert parse_settings({"transformer_width": 1}).transformer_width == 1


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "name"), [*of_kind("int"), *of_kind("float")])
def test_every_number_has_bounds_and_is_refused_beyond_them(section, name):
    meta = FIELDS[section, name].metadata
    low, high = meta["low"], meta["high"]
    assert low < high < 2**63
    kind = float if (section, name) in of_kind("float") else int
    for value in (low - 1, high + 1, -(10**30), 10**400, float("inf"), -float("inf"), float("nan")):
        if kind is int and isinstance(value, float) and abs(value) < float("inf"):
            value = int(value)
        with pytest.raises(SettingsError, match=f"{name} is "):
            parse_settings(inside(section, name, value))


def test_a_number_without_bounds_cannot_be_declared():
    for default in (1, (0.1, 0.2)):
        with pytest.raises(TypeError, match="without bounds"):
            setting(default, "of something", low=0)


@pytest.mark.parametrize(
    "content",
    [
        {"gaussian": {"timesteps": 1}},
        {"gaussian": {"steps": 1001}},
        {"gaussian": {"training_steps": 5, "steps": 5}},
        {"gaussian": {"self_conditioning_probability": 0.0}},
        {"gaussian": {"self_conditioning_probability": 1.0}},
        {"gaussian": {"betas": [0.01, 0.01]}},
        {"seed": 0},
        {"transformer_layers": 0},
    ],
)
def test_ends_of_a_range_are_in_it(content):
    assert flatten(parse_settings(content).to_dict()).items() >= flatten(content).items()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"timesteps": 1001, "steps": 1002}, r"steps is 1002, expected 1 \.\. 1001"),
        ({"training_steps": 5, "steps": 6}, r"steps is 6, expected 1 \.\. 5, the length of the trained schedule"),
        ({"timesteps": 10, "training_steps": 11}, "training_steps is 11, expected at most timesteps = 10"),
        ({"betas": [0.05, 0.02]}, r"betas is \[0\.05, 0\.02\], expected the last to be at least the first"),
        ({"betas": [0.05]}, r"betas is \[0\.05\], expected a list of 2 numbers"),
        ({"betas": 0.05}, r"betas is 0\.05, expected a list of 2 numbers"),
        ({"betas": [0.1, "x"]}, r"one of betas = \[0\.1, 'x'\] is 'x', expected float"),
        ({"betas": [0.1, 1.0]}, r"one of betas = \[0\.1, 1\.0\] is 1\.0, expected a value in"),
        ({"betas": [1e-4, 0.2]}, r"betas is \[0\.0001, 0\.2\], expected a smaller last one, or fewer timesteps"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(own, message):
    with pytest.raises(SettingsError, match=rf"^here: in diffusion\.gaussian, {message}"):
        parse_settings({"gaussian": own}, "here")


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("last", [0.02, 0.06, 0.08, 0.1, 0.15, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("timesteps", [10, 100, 1001])
def test_settings_accept_a_schedule_if_the_process_can_be_built(spacing, last, timesteps):
    for trained in (None, 5, 10):
        for steps in (1, 2, 3, 5):
            try:
                GaussianSettings(timesteps, (1e-4, last), trained, steps=steps, step_spacing=spacing)
                accepted = True
            except SettingsError:
                accepted = False
            try:
                process = diffusion.GaussianDiffusion(diffusion.linear_beta_schedule(timesteps, 1e-4, last))
                (process.respace(trained) if trained else process).respace(steps, spacing)
                built = True
            except ValueError:
                built = False
            assert accepted == built, (trained, steps)


def test_every_schedule_of_hidiff_can_be_built():
    for timesteps in (1, 2, 3, 10, 100, 999, 1000):
        process = diffusion.BernoulliDiffusion(diffusion.cosine_beta_schedule(timesteps))
        for steps in {1, 2, min(10, timesteps), timesteps}:
            if steps <= timesteps:
                process.respace(steps)


# --- section hidiff --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [-1, 11])
def test_steps_of_hidiff_are_within_its_schedule(steps):
    with pytest.raises(SettingsError, match=f"in diffusion.hidiff, steps is {steps}, expected"):
        parse_settings({HIDIFF: {"steps": steps}})


def test_published_is_the_papers_refiner():
    ours, theirs = HiDiffSettings(), HiDiffSettings(published=True)
    assert (ours.corrects_prior, ours.is_calibrated, ours.rate_alone) == (True, True, 8e-4)
    assert (theirs.corrects_prior, theirs.is_calibrated, theirs.rate_alone) == (False, False, 1e-4)


@pytest.mark.parametrize(
    ("segmentor", "trainer", "file"),
    [
        (None, "nnUNetTrainer", None),
        ("nnUNetTrainerBaseline", "nnUNetTrainerBaseline", None),
        ("fold_0/checkpoint_final.pth", "nnUNetTrainer", "fold_0/checkpoint_final.pth"),
        ("./weights", "nnUNetTrainer", "./weights"),
    ],
)
def test_a_segmentor_is_a_trainer_or_a_file(segmentor, trainer, file):
    own = HiDiffSettings(segmentor=segmentor)
    assert (own.segmentor_trainer, own.segmentor_checkpoint) == (trainer, file)


# --- changes ---------------------------------------------------------------------------------------------------------


def test_changes_to_a_section_keep_its_other_settings():
    merged = merge_settings({"seed": 3, HIDIFF: {"timesteps": 9, "steps": 2}}, {HIDIFF: {"steps": 4}})
    assert merged == {"seed": 3, HIDIFF: {"timesteps": 9, "steps": 4}}


def test_assignments_become_a_section():
    texts = ["seed=5", "gaussian.sampler=ddim", "hidiff.refiner_norm=batch", "hidiff.steps=1", "num_epochs=null"]
    content = read_assignments([*texts, "gaussian.betas=[0.0002, 0.03]"])
    assert content == {
        "seed": 5,
        "num_epochs": None,
        "gaussian": {"sampler": "ddim", "betas": [2e-4, 0.03]},
        "hidiff": {"refiner_norm": "batch", "steps": 1},
    }
    assert parse_settings(content).hidiff.refiner_norm == "batch"


@pytest.mark.parametrize("text", ["steps", "=5", ""])
def test_an_assignment_that_is_none_is_refused(text):
    with pytest.raises(SettingsError, match="expected key=value"):
        read_assignments([text])


def test_an_assignment_to_a_value_and_into_it_is_refused():
    with pytest.raises(SettingsError, match=r"gaussian\.steps: gaussian is given a value and settings of its own"):
        read_assignments(["gaussian=3", "gaussian.steps=5"])


def test_names_of_nested_sections_are_whole():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2, "e": {}}) == {"a.b.c": 1, "d": 2}


@pytest.mark.parametrize("cls", CLASSES.values())
def test_a_table_lists_every_documented_setting(cls):
    table = settings_table(cls)
    assert all(f"| `{f.name}` | {json.dumps(f.default)} |" in table for f in documented(cls))
    assert len(table.splitlines()) == 2 + len(documented(cls))


# --- environment -----------------------------------------------------------------------------------------------------

DEFAULT = DiffusionSettings()


def environ(**values: str) -> dict[str, str]:
    return {"PATH": "/bin", "nnUNet_raw": "x"} | {ENVIRONMENT_PREFIX + key: value for key, value in values.items()}


def test_without_variables_nothing_is_overridden():
    assert environment_overrides(environ()) == {}
    assert apply_environment(DEFAULT, "gaussian", environ()) == DEFAULT


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sampler", "ddim", "ddim"),
        ("sampler", " DDIM ", "ddim"),
        ("steps", "7", 7),
        ("samples", "3", 3),
        ("seed", "9", 9),
    ],
)
def test_a_variable_overrides_one_setting(key, text, value):
    assert environment_overrides(environ(**{key: text})) == {key: value}
    found = flatten(apply_environment(DEFAULT, "gaussian", environ(**{key: text})).to_dict())
    name = key if key in ("samples", "seed") else f"gaussian.{key}"
    assert found == {**flatten(DEFAULT.to_dict()), name: value}


def test_names_in_upper_case_are_known():
    """Windows keeps names of variables in upper case."""
    given = {name.upper(): value for name, value in environ(steps="7", sampler="ddim").items()}
    assert environment_overrides(given) == {"steps": 7, "sampler": "ddim"}
    with pytest.raises(SettingsError, match="NNUNET_DIFFUSION_STEP;"):
        environment_overrides({"NNUNET_DIFFUSION_STEP": "7"})


@pytest.mark.parametrize("section", SUBSECTIONS)
def test_variables_are_those_of_the_chosen_section(section):
    found = apply_environment(DEFAULT, section, environ(sampler="ddpm", steps="2", samples="4", seed="1"))
    assert (found.samples, found.seed, getattr(found, section).steps) == (4, 1, 2)
    assert all(getattr(found, other) == getattr(DEFAULT, other) for other in SUBSECTIONS if other != section)
    if section == HIDIFF:
        assert found.hidiff.sampler == "ddpm"


def test_variables_win_over_samples_and_seed_that_hidiff_has_of_version_0_1():
    old = parse_settings({HIDIFF: {"samples": 3, "seed": 5}})
    found = apply_environment(old, HIDIFF, environ(samples="4"))
    assert (found.hidiff.samples, found.hidiff.seed) == (4, 5)


def test_variables_of_the_process_are_read_when_asked(monkeypatch):
    for key in ENVIRONMENT_KEYS:
        monkeypatch.delenv(ENVIRONMENT_PREFIX + key, raising=False)
    assert apply_environment(DEFAULT, "gaussian") == DEFAULT
    monkeypatch.setenv("nnUNet_diffusion_steps", "9")
    assert environment_overrides() == {"steps": 9}
    assert apply_environment(DEFAULT, "gaussian").gaussian.steps == 9


@pytest.mark.parametrize("key", ["steps", "samples", "seed"])
@pytest.mark.parametrize("text", ["", "five", "2.5", "1e3", "none"])
def test_a_variable_that_is_no_integer_is_named(key, text):
    message = rf"^nnUNet_diffusion_{key} is {re.escape(repr(text))}, expected an integer"
    with pytest.raises(SettingsError, match=message):
        environment_overrides(environ(**{key: text}))


@pytest.mark.parametrize(
    ("section", "key", "text", "message"),
    [
        ("gaussian", "steps", "0", "steps is 0"),
        ("gaussian", "steps", "1002", "steps is 1002, expected 1"),
        ("hidiff", "steps", "11", r"steps is 11, expected 0 \.\. 10"),
        ("gaussian", "samples", "-1", "samples is -1"),
        ("score", "seed", "-1", "seed is -1"),
        ("gaussian", "sampler", "euler", "sampler is 'euler', expected one of ddpm, ddim"),
        ("score", "sampler", "", "sampler is ''"),
    ],
)
def test_a_variable_with_an_unusable_value_is_named(section, key, text, message):
    with pytest.raises(SettingsError, match=rf"environment nnUNet_diffusion_{key}={text}: {message}"):
        apply_environment(DEFAULT, section, environ(**{key: text}))


@pytest.mark.parametrize("key", ["step", "eta", "timesteps", "steps_", ""])
def test_an_unknown_variable_is_named_with_the_known_ones(key):
    with pytest.raises(SettingsError, match=f"unknown environment variable nnUNet_diffusion_{key};") as error:
        environment_overrides(environ(**{key: "1"}))
    assert all(ENVIRONMENT_PREFIX + known in str(error.value) for known in ENVIRONMENT_KEYS)


def test_a_variable_of_names_is_no_setting():
    assert environment_overrides({"nnUNet_diffusion_allow": "a.b", "nnUNet_diffusion_steps": "3"}) == {"steps": 3}

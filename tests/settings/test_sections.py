"""Behaviour of the settings in plans and of their overrides in the environment."""

import json
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from nnunetv2_diffusion import diffusion
from nnunetv2_diffusion import settings as settings_module
from nnunetv2_diffusion.settings import (
    ENVIRONMENT_KEYS,
    ENVIRONMENT_PREFIX,
    HIDIFF,
    SUBSECTIONS,
    DiffusionSettings,
    HiDiffSettings,
    SettingsError,
    apply_environment,
    environment_overrides,
    flatten,
    merge_settings,
    parse_settings,
    read_assignments,
    read_settings,
    settings_table,
)

FIELDS = {f.name: f for f in fields(DiffusionSettings) if f.name not in SUBSECTIONS}
HIDIFF_FIELDS = {f.name: f for f in fields(HiDiffSettings)}
OPTIONAL = ("training_steps", "num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
INTEGERS = [name for name, f in FIELDS.items() if "int" in str(f.type)]
FLOATS = [name for name, f in FIELDS.items() if f.type is float]
# a valid value of every field that is not its default
OTHER = {
    "timesteps": 500,
    "beta_start": 2e-4,
    "beta_end": 0.03,
    "training_steps": 50,
    "time_sampling": "importance",
    "steps": 7,
    "sampler": "ddim",
    "step_spacing": "linspace",
    "eta": 0.5,
    "samples": 4,
    "seed": 9,
    "self_conditioning_probability": 0.25,
    "time_conditioning": False,
    "mask_encoding": "analog-bits",
    "transformer_layers": 2,
    "transformer_heads": 4,
    "transformer_width": 1.0,
    "recipe": "nnunet",
    "num_epochs": 10,
    "num_iterations_per_epoch": 20,
    "num_val_iterations_per_epoch": 5,
    "max_bad_steps": 3,
}


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper_in_the_host():
    settings = DiffusionSettings()
    assert (settings.timesteps, settings.beta_start, settings.beta_end) == (1001, 1e-4, 0.02)
    assert (settings.steps, settings.sampler, settings.samples, settings.seed) == (2, "ddpm", 1, 0)  # 5 in the paper
    assert settings.step_spacing == "trailing"  # linspace in the paper
    assert (settings.recipe, settings.time_sampling, settings.time_conditioning) == ("paper", "uniform", True)
    assert settings.self_conditioning_probability == 0.5
    assert all(getattr(settings, name) is None for name in OPTIONAL)


@pytest.mark.parametrize("configuration", [{}, {"diffusion": None}, {"diffusion": {}}, {"patch_size": [8, 8]}])
def test_plans_without_the_section_use_the_defaults(configuration):
    assert read_settings(configuration) == DiffusionSettings()


def test_what_the_section_sets_is_read_and_the_rest_is_default():
    settings = read_settings({"diffusion": {"steps": 3, "eta": 0.5}})
    assert settings == DiffusionSettings(steps=3, eta=0.5)
    assert settings.timesteps == 1001


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(FrozenInstanceError):
        DiffusionSettings().steps = 3


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_doc(name):
    assert len(FIELDS[name].metadata["doc"]) > 5


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_can_be_set_alone(name):
    assert OTHER[name] != FIELDS[name].default
    assert getattr(parse_settings({name: OTHER[name]}), name) == OTHER[name]


@pytest.mark.parametrize("values", [{}, OTHER])
def test_settings_survive_json(values):
    settings = DiffusionSettings(**values)
    assert set(settings.to_dict()) == {*FIELDS, *SUBSECTIONS}
    assert parse_settings(json.loads(json.dumps(settings.to_dict()))) == settings


def test_chain_length_is_that_of_training():
    assert DiffusionSettings().chain_length == 1001
    assert DiffusionSettings(training_steps=5).chain_length == 5


def test_names_of_samplers_and_spacings_are_those_of_the_processes():
    assert (settings_module.SAMPLERS, settings_module.SPACINGS) == (diffusion.SAMPLERS, diffusion.SPACINGS)


def test_a_chain_has_at_most_the_steps_of_the_trained_schedule():
    assert DiffusionSettings(training_steps=5, steps=5).steps == 5
    with pytest.raises(SettingsError, match=r"steps is 6, expected 1 \.\. 5, the length of the trained schedule"):
        DiffusionSettings(training_steps=5, steps=6)


# --- unknown keys and types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("step", "steps"), ("time_steps", "timesteps"), ("Sampler", "sampler"), ("transformer_head", "transformer_heads")],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(key, nearest):
    with pytest.raises(SettingsError, match=rf"^some plans: unknown setting '{key}' .*did you mean '{nearest}'\?"):
        parse_settings({key: 5}, "some plans")


def test_an_unknown_key_like_no_other_is_named_with_all_known_ones():
    with pytest.raises(SettingsError, match="unknown setting 'xyzzy'") as error:
        parse_settings({"xyzzy": 5})
    assert all(name in str(error.value) for name in FIELDS)


@pytest.mark.parametrize("section", [[], "steps", 5, [("steps", 5)]])
def test_a_section_that_is_no_mapping_is_named(section):
    with pytest.raises(SettingsError, match=f"^plans: .*{re.escape(repr(section))}, expected a mapping"):
        read_settings({"diffusion": section})


@pytest.mark.parametrize("value", [True, False, 3.0, "3", [3], {}])
@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_is_no_bool_no_float_and_no_text(name, value):
    expected = "int or null" if name in OPTIONAL else "int"
    with pytest.raises(SettingsError, match=rf"^here: .*{name} is {re.escape(repr(value))}, expected {expected}$"):
        parse_settings({name: value}, "here")


@pytest.mark.parametrize("value", [True, False, "0.5", [0.5], None])
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_is_no_bool_no_text_and_no_null(name, value):
    with pytest.raises(SettingsError, match=rf"{name} is {re.escape(repr(value))}, expected float$"):
        parse_settings({name: value})


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_bool_is_no_number_and_no_text(value):
    with pytest.raises(SettingsError, match=rf"time_conditioning is {value!r}, expected bool$"):
        parse_settings({"time_conditioning": value})


@pytest.mark.parametrize("name", ["time_sampling", "sampler", "recipe"])
@pytest.mark.parametrize("value", ["", "DDPM", "other"])
def test_a_choice_is_one_of_the_listed(name, value):
    choices = ", ".join(FIELDS[name].metadata["choices"])
    with pytest.raises(SettingsError, match=f"{name} is {value!r}, expected one of {choices}$"):
        parse_settings({name: value})
    with pytest.raises(SettingsError, match=f"{name} is 1, expected str$"):
        parse_settings({name: 1})


def test_a_whole_number_is_a_float():
    assert parse_settings({"eta": 1}).eta == 1


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in OPTIONAL])
def test_null_is_refused_where_it_has_no_meaning(name):
    with pytest.raises(SettingsError, match=f"{name} is None, expected"):
        parse_settings({name: None})


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_accepted_where_it_has_a_meaning(name):
    assert getattr(parse_settings({name: None}), name) is None


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timesteps", 0),
        ("timesteps", 100_001),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("training_steps", 0),
        ("steps", 0),
        ("steps", -1),
        ("eta", -0.1),
        ("eta", 1.1),
        ("samples", 0),
        ("seed", -1),
        ("self_conditioning_probability", -0.1),
        ("self_conditioning_probability", 1.1),
        ("transformer_layers", -1),
        ("transformer_heads", 0),
        ("transformer_width", 0.0),
        ("transformer_width", 1.5),
        ("num_epochs", 0),
        ("num_iterations_per_epoch", 0),
        ("num_val_iterations_per_epoch", 0),
        ("max_bad_steps", 1),
        ("max_bad_steps", 10_001),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(SettingsError, match=rf"{name} is {re.escape(repr(value))}, expected (at least|a value in) "):
        parse_settings({name: value})


@pytest.mark.parametrize(
    "section",
    [
        {"timesteps": 1, "steps": 1},
        {"steps": 1001},
        {"training_steps": 1001},
        {"training_steps": 5, "steps": 5},
        {"eta": 0.0},
        {"eta": 1.0},
        {"seed": 0},
        {"self_conditioning_probability": 0.0},
        {"self_conditioning_probability": 1.0},
        {"transformer_layers": 0},
        {"beta_start": 0.01, "beta_end": 0.01},
    ],
)
def test_ends_of_a_range_are_in_it(section):
    assert parse_settings(section) == DiffusionSettings(**section)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FLOATS)
def test_infinity_is_out_of_range(name, value):
    with pytest.raises(SettingsError, match=f"{name} is {value}"):
        parse_settings({name: value})


@pytest.mark.parametrize("name", FLOATS)
def test_nan_is_out_of_range(name):
    with pytest.raises(SettingsError, match=f"{name} is nan"):
        parse_settings(json.loads(f'{{"{name}": NaN}}'))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"timesteps": 1}, r"steps is 2, expected 1 \.\. 1"),
        ({"timesteps": 1001, "steps": 1002}, r"steps is 1002, expected 1 \.\. 1001"),
        ({"training_steps": 5, "steps": 6}, r"steps is 6, expected 1 \.\. 5"),
        ({"timesteps": 10, "training_steps": 11}, "training_steps is 11, expected at most timesteps = 10"),
        ({"beta_start": 0.05}, r"beta_end is 0\.02, expected at least beta_start = 0\.05"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(section, message):
    with pytest.raises(SettingsError, match=rf"^here: in diffusion, {message}"):
        parse_settings(section, "here")


# --- environment -----------------------------------------------------------------------------------------------------


def environ(**values: str) -> dict[str, str]:
    return {"PATH": "/bin", "nnUNet_raw": "x"} | {ENVIRONMENT_PREFIX + key: value for key, value in values.items()}


def test_without_variables_nothing_is_overridden():
    settings = DiffusionSettings(steps=3)
    assert environment_overrides(environ()) == {}
    assert apply_environment(settings, environ()) == settings


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
    settings = DiffusionSettings(steps=3, eta=0.5)
    expected = replace(settings, **{key: value})
    assert apply_environment(settings, environ(**{key: text})) == expected != settings


def test_names_in_upper_case_are_known():
    """Windows keeps names of variables in upper case."""
    given = {name.upper(): value for name, value in environ(steps="7", sampler="ddim").items()}
    assert environment_overrides(given) == {"steps": 7, "sampler": "ddim"}
    with pytest.raises(SettingsError, match="NNUNET_DIFFUSION_STEP;"):
        environment_overrides({"NNUNET_DIFFUSION_STEP": "7"})


def test_variables_override_together():
    found = apply_environment(DiffusionSettings(), environ(sampler="ddim", steps="2", samples="4", seed="1"))
    assert found == DiffusionSettings(sampler="ddim", steps=2, samples=4, seed=1)


def test_variables_of_the_process_are_read_when_asked(monkeypatch):
    for key in ENVIRONMENT_KEYS:
        monkeypatch.delenv(ENVIRONMENT_PREFIX + key, raising=False)
    assert apply_environment(DiffusionSettings()) == DiffusionSettings()
    monkeypatch.setenv("nnUNet_diffusion_steps", "9")
    assert environment_overrides() == {"steps": 9}
    assert apply_environment(DiffusionSettings()).steps == 9


@pytest.mark.parametrize("key", ["steps", "samples", "seed"])
@pytest.mark.parametrize("text", ["", "five", "2.5", "1e3", "none"])
def test_a_variable_that_is_no_integer_is_named(key, text):
    with pytest.raises(
        SettingsError, match=rf"^nnUNet_diffusion_{key} is {re.escape(repr(text))}, expected an integer"
    ):
        apply_environment(DiffusionSettings(), environ(**{key: text}))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("steps", "0", "steps is 0"),
        ("steps", "1002", "steps is 1002, expected 1"),
        ("samples", "-1", "samples is -1"),
        ("seed", "-1", "seed is -1"),
        ("sampler", "euler", "sampler is 'euler', expected one of ddpm, ddim"),
        ("sampler", "", "sampler is ''"),
    ],
)
def test_a_variable_with_an_unusable_value_is_named(key, text, message):
    with pytest.raises(SettingsError, match=rf"environment nnUNet_diffusion_{key}={text}: {message}"):
        apply_environment(DiffusionSettings(), environ(**{key: text}))


@pytest.mark.parametrize("key", ["step", "eta", "timesteps", "steps_", ""])
def test_an_unknown_variable_is_named_with_the_known_ones(key):
    with pytest.raises(SettingsError, match=f"unknown environment variable nnUNet_diffusion_{key};") as error:
        environment_overrides(environ(**{key: "1"}))
    assert all(ENVIRONMENT_PREFIX + known in str(error.value) for known in ENVIRONMENT_KEYS)


def test_every_key_of_the_environment_is_a_setting():
    assert set(ENVIRONMENT_KEYS) <= set(FIELDS)


# --- section hidiff --------------------------------------------------------------------------------------------------

HIDIFF_OTHER = {
    "timesteps": 20,
    "steps": 0,
    "sampler": "ddpm",
    "samples": 3,
    "seed": 5,
    "binarized": False,
    "cross_transformer": False,
    "refiner_width": 128,
    "refiner_norm": "batch",
    "prior_residual": False,
    "noise_loss": "bce",
    "focal_gamma": 1.0,
    "calibrated": False,
    "lambda_focal": 0.5,
    "lambda_diffusion": 0.0,
    "collaborative": False,
    "learning_rate": 1e-3,
    "segmentor_learning_rate": 2e-4,
    "segmentor_trainer": "nnUNetTrainerBaseline",
    "segmentor_checkpoint": "somewhere.pth",
    "pretraining_epochs": 4,
    "pretraining_learning_rate": 1e-2,
    "merit_variant": "nano",
    "merit_weights": "timm",
}


def test_defaults_of_hidiff_are_the_papers_but_for_the_steps():
    own = DiffusionSettings().hidiff
    assert (own.timesteps, own.steps, own.sampler) == (10, 1, "ddim")
    assert (own.binarized, own.cross_transformer, own.noise_loss, own.collaborative) == (True, True, "focal", True)
    assert (own.focal_gamma, own.lambda_focal, own.lambda_diffusion) == (2, 1, 1)
    assert (own.learning_rate, own.segmentor_learning_rate) == (1e-4, 1e-4)


@pytest.mark.parametrize("name", HIDIFF_FIELDS)
def test_every_setting_of_hidiff_can_be_set_alone_and_survives_json(name):
    assert HIDIFF_OTHER[name] != HIDIFF_FIELDS[name].default
    settings = parse_settings({HIDIFF: {name: HIDIFF_OTHER[name]}})
    assert settings == DiffusionSettings(hidiff=HiDiffSettings(**{name: HIDIFF_OTHER[name]}))
    assert parse_settings(json.loads(json.dumps(settings.to_dict()))) == settings


def test_an_unknown_key_of_hidiff_is_named_with_its_section():
    with pytest.raises(SettingsError, match=r"^plans: unknown setting 'binarised' in diffusion\.hidiff; did you mean"):
        parse_settings({HIDIFF: {"binarised": True}}, "plans")


@pytest.mark.parametrize("section", [[], 3, "steps"])
def test_a_hidiff_section_that_is_no_mapping_is_named(section):
    with pytest.raises(SettingsError, match=r"diffusion\.hidiff is .*expected a mapping"):
        parse_settings({HIDIFF: section})


@pytest.mark.parametrize("steps", [-1, 11])
def test_steps_of_hidiff_are_within_its_schedule(steps):
    with pytest.raises(SettingsError, match=f"in diffusion.hidiff, steps is {steps}, expected"):
        parse_settings({HIDIFF: {"steps": steps}})


def test_the_environment_sets_the_sampling_of_hidiff():
    environ = {"nnUNet_diffusion_steps": "0", "nnUNet_diffusion_seed": "3"}
    assert apply_environment(HiDiffSettings(), environ) == HiDiffSettings(steps=0, seed=3)
    with pytest.raises(SettingsError, match=r"^environment nnUNet_diffusion_steps=11: steps is 11, expected 0 \.\. 10"):
        apply_environment(HiDiffSettings(), {"nnUNet_diffusion_steps": "11"})


def test_changes_to_hidiff_keep_its_other_settings():
    merged = merge_settings({"steps": 3, HIDIFF: {"seed": 1, "steps": 2}}, {HIDIFF: {"steps": 4}})
    assert merged == {"steps": 3, HIDIFF: {"seed": 1, "steps": 4}}


def test_the_table_of_hidiff_lists_every_setting():
    table = settings_table(HiDiffSettings)
    assert all(f"| `{name}` | {json.dumps(f.default)} |" in table for name, f in HIDIFF_FIELDS.items())


# --- other sections --------------------------------------------------------------------------------------------------

INNER_OTHER = {
    "score": {"weight": 2.0, "latent_channels": 3, "steps": 5},
}
INNER = [(section, name) for section in INNER_OTHER for name in INNER_OTHER[section]]


def test_every_section_has_a_test():
    assert {HIDIFF, *INNER_OTHER} == set(SUBSECTIONS)
    for section, values in INNER_OTHER.items():
        assert set(values) == {f.name for f in fields(SUBSECTIONS[section])}


@pytest.mark.parametrize(("section", "name"), INNER)
def test_every_setting_of_a_section_can_be_set_alone_and_survives_json(section, name):
    value = INNER_OTHER[section][name]
    settings = parse_settings({section: {name: value}})
    assert value != getattr(getattr(DiffusionSettings(), section), name)
    assert settings == DiffusionSettings(**{section: SUBSECTIONS[section](**{name: value})})
    assert parse_settings(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("section", "found", "message"),
    [
        ("score", {"wait": 0.5}, r"unknown setting 'wait' in diffusion\.score; did you mean 'weight'"),
        ("score", {"weight": -1.0}, r"in diffusion\.score, weight is -1\.0, expected a value in \[0"),
        ("score", 3, r"diffusion\.score is 3, expected a mapping"),
    ],
)
def test_what_a_section_cannot_hold_is_named(section, found, message):
    with pytest.raises(SettingsError, match=message):
        parse_settings({section: found}, "plans")


@pytest.mark.parametrize(("section", "name"), INNER)
def test_changes_to_a_section_keep_its_other_settings(section, name):
    present = {k: v for k, v in INNER_OTHER[section].items() if k != name}
    merged = merge_settings({section: present}, {section: {name: INNER_OTHER[section][name]}})
    assert merged == {section: INNER_OTHER[section]}


def test_assignments_become_a_section():
    section = read_assignments(
        ["steps=5", "sampler=ddim", "hidiff.refiner_norm=batch", "hidiff.steps=1", "num_epochs=null"]
    )
    expected = {"refiner_norm": "batch", "steps": 1}
    assert section == {"steps": 5, "sampler": "ddim", "hidiff": expected, "num_epochs": None}
    assert parse_settings(section).hidiff.refiner_norm == "batch"


@pytest.mark.parametrize("text", ["steps", "=5", ""])
def test_an_assignment_that_is_none_is_refused(text):
    with pytest.raises(SettingsError, match="expected key=value"):
        read_assignments([text])


# --- bounds ----------------------------------------------------------------------------------------------------------


NUMBERS = [
    (cls, f)
    for cls in (DiffusionSettings, *SUBSECTIONS.values())
    for f in fields(cls)
    if any(kind in str(f.type) for kind in ("int", "float")) and "choices" in f.metadata
]


def section_of(cls, name, value):
    inner = {name: value}
    outer = next((key for key, c in SUBSECTIONS.items() if c is cls), None)
    return inner if outer is None else {outer: inner}


@pytest.mark.parametrize(("cls", "f"), NUMBERS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", "")))
def test_every_number_has_bounds_and_is_refused_beyond_them(cls, f):
    low, high = f.metadata["low"], f.metadata["high"]
    assert low is not None
    assert high is not None
    assert low < high < 2**63
    kind = float if "float" in str(f.type) else int
    for value in (low - 1, high + 1, -(10**30), 10**400, float("inf"), -float("inf"), float("nan")):
        if kind is int and isinstance(value, float) and value == value and abs(value) != float("inf"):
            value = int(value)
        with pytest.raises(SettingsError, match=f"{f.name} is "):
            parse_settings(section_of(cls, f.name, value))


def test_a_number_without_bounds_cannot_be_declared():
    from nnunetv2_diffusion.settings import setting

    with pytest.raises(TypeError, match="without bounds"):
        setting(1, "of something", low=0)


def test_a_beta_of_1_is_refused_with_the_settings_name():
    for section in ({"beta_end": 0.2}, {"beta_end": 0.9, "timesteps": 100, "training_steps": 5}):
        with pytest.raises(SettingsError, match=r"beta_end is .*expected less, or fewer timesteps"):
            parse_settings(section)
    assert parse_settings({"beta_end": 0.2, "timesteps": 100}).beta_end == 0.2


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("beta_end", [0.02, 0.06, 0.08, 0.1, 0.15, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("timesteps", [10, 100, 1001])
def test_settings_accept_a_schedule_if_the_process_can_be_built(spacing, beta_end, timesteps):
    for trained in (None, 5, 10):
        for steps in (1, 2, 3, 5):
            try:
                DiffusionSettings(timesteps, 1e-4, beta_end, trained, steps=steps, step_spacing=spacing)
                accepted = True
            except SettingsError as error:
                if "expected 1 .." in str(error):
                    continue
                accepted = False
            try:
                process = diffusion.GaussianDiffusion(diffusion.linear_beta_schedule(timesteps, 1e-4, beta_end))
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


def test_a_variable_of_names_is_no_setting():
    assert environment_overrides({"nnUNet_diffusion_allow": "a.b", "nnUNet_diffusion_steps": "3"}) == {"steps": 3}


def test_names_of_nested_sections_are_whole():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2, "e": {}}) == {"a.b.c": 1, "d": 2}

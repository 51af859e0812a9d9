"""The config: what is accepted, and how every mistake is told."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from overnight.config import Config, Domain, config_hash, json_schema, load_config, with_parameters
from overnight.errors import UserError
from overnight.problems import roles
from overnight.settings import Training

LEAST = "name: demo\nmodel: {base: some/model}\ndata: {source: rows.csv}\n"


@pytest.fixture
def load(tmp_path):
    """Loads a text as a config file; complaints lose the folder of the test."""

    def loaded(text: str | bytes, *overrides: str) -> Config:
        path = tmp_path / "demo.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            return load_config(path, overrides, problems=roles())
        except UserError as error:
            raise UserError(*[str(c).replace(f"{tmp_path}/", "") for c in error.complaints]) from None

    return loaded


def complaints(load, text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return [str(complaint) for complaint in caught.value.complaints]


def test_the_least_config_has_every_default(load):
    """Three keys make a config; the rest is what the classes say."""
    config = load(LEAST)
    assert config.problem == "sequence-classification"
    assert config.training == Training()
    assert config.promotion.mode == "auto"


def test_all_mistakes_are_told_at_once(load):
    """Six mistakes on four levels, one of them on the command line: six lines, each with its place."""
    text = """
name: demo
model: {base: some/model, max_lenght: 64}
data: {source: rows.csv, columns: {txt: body}}
trainig: {epochs: 3}
search: {trials: 0, space: {lerning_rate: {low: 0.1, high: 0.2}}}
"""
    assert sorted(complaints(load, text, "training.epochs=none")) == [
        "--set training.epochs: should be a valid number, got 'none'",
        "demo.yaml: data → columns → txt: not a column of sequence-classification (which has text, label);"
        " did you mean text?",
        "demo.yaml: model → max_lenght: unknown key; did you mean max_length?",
        "demo.yaml: search → space → lerning_rate: not a training parameter; did you mean learning_rate?",
        "demo.yaml: search → trials: should be greater than or equal to 1, got 0",
        "demo.yaml: trainig: unknown key; did you mean training?",
    ]


@pytest.mark.parametrize(
    ("added", "complaint"),
    [
        ("descripton: x", "descripton: unknown key; did you mean description?"),
        ("split: {tset: 0.1}", "split → tset: unknown key; did you mean test?"),
        ("training: {epoch: 1}", "training → epoch: unknown key; did you mean epochs?"),
        ("validation: {expect: {lables: {}}}", "validation → expect → lables: unknown key; did you mean labels?"),
        (
            "validation: {expect: {labels: {knwon: [a]}}}",
            "validation → expect → labels → knwon: unknown key; did you mean known?",
        ),
        (
            "validation: {also: [{expect: e, argument: {}}]}",
            "0 → argument: unknown key; did you mean arguments?",
        ),
        (
            "search: {space: {epochs: {low: 1, hgh: 2}}}",
            "search → space → epochs → hgh: unknown key; did you mean high?",
        ),
        ("evaluation: {zzz: 1}", "evaluation → zzz: unknown key"),
        ("1: x", "1: a key must be text"),
    ],
)
def test_unknown_keys_at_every_level(load, added, complaint):
    """The nearest key is one of the section the mistake stands in; nothing near, nothing offered."""
    found = complaints(load, LEAST + added)
    assert any(line.endswith(complaint) for line in found), found


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must hold keys and values, as `name: my-model`, got an empty file"),
        ("# only a comment", "must hold keys and values, as `name: my-model`, got an empty file"),
        ("- a", "must hold keys and values, as `name: my-model`, got a list"),
        ("just words", "must hold keys and values, as `name: my-model`, got 'just words'"),
        ("name: demo\nmodel: {base: [\n", "line 3, column 1: not valid YAML: "),
        ("name: demo\ntraining:\n\tepochs: 1", "line 3, column 1: not valid YAML: "),
        ("name: one\nname: two", "line 2, column 1: not valid YAML: the key 'name' stands twice in a section"),
        ("training:\n  epochs: 1\n  epochs: 2", "line 3, column 3: not valid YAML: the key 'epochs' stands twice"),
        ("name: !!python/name:os.system", "line 1, column 7: not valid YAML: "),
        ("a: 1\n---\nb: 2", "line 2, column 1: not valid YAML: "),
        ("[" * 2000, "not valid YAML: "),
        (b"name: \x00", "not valid YAML: "),
        (b"\x89PNG\r\n\xff\xfe", "must be YAML in UTF-8"),
    ],
)
def test_what_is_no_config_file(load, text, complaint):
    """One complaint on one line, with the line number where YAML knows it."""
    (found,) = complaints(load, text)
    assert complaint in found
    assert "\n" not in found


def test_missing_files_and_folders(tmp_path, load):
    """The nearest file is offered; a folder is named as one."""
    load(LEAST)
    for path, said in (
        (tmp_path / "demmo.yaml", f"no such file; did you mean {tmp_path / 'demo.yaml'}?"),
        (tmp_path, "is a folder, expected a YAML file"),
        (tmp_path / "no" / "where.yaml", "no such file"),
        (tmp_path / ("long" * 100), "File name too long"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(caught.value).endswith(said)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ("training:", "training: has no keys; fill it, or leave it out"),
        ("training: 3", "training: must be a section of keys and values, got 3"),
        ("search: {space: [epochs]}", "search → space: must be a section of keys and values, got ['epochs']"),
        ("validation: {expect: {language: {expected: en}}}", "language → expected: must be a list, got 'en'"),
        (
            "validation: {expect: {labels: {known: [true, a]}}}",
            "labels → known → 0: must be text; write it in quotes, got True",
        ),
        (
            "validation: {expect: {row_count: {min: 9, max: 3}}}",
            "row_count: min must not be above max, got min 9 and max 3",
        ),
        (
            "validation: {expect: {characters: {min: 9, max: 3}}}",
            "characters: min must not be above max, got min 9 and max 3",
        ),
        ("promotion: {mode: automatic}", "got 'automatic'; did you mean auto?"),
        ("problem: sequence-clasification", "did you mean sequence-classification?"),
        ("split: {test: 0.5}", "split → test: should be less than 0.5, got 0.5"),
        ("split: {test: .nan}", "split → test: should be a finite number, got nan"),
        ("training: {learning_rate: .inf}", "training → learning_rate: should be a finite number, got inf"),
        ("training: {learning_rate: 0}", "training → learning_rate: should be greater than 0, got 0"),
        ("training: {epochs: 1.5, batch_size: 1.5}", "training → batch_size: should be a valid integer"),
    ],
)
def test_values_out_of_bounds(load, section, complaint):
    """A wrong kind or size of value is told with the rule and the value."""
    (found,) = complaints(load, LEAST + section)
    assert complaint in found


def test_names(load):
    """A name that no registry takes is refused with one that it would."""
    (found,) = complaints(load, LEAST.replace("demo", "My Model!"))
    assert found.endswith("start with a letter or a digit, got 'My Model!'; did you mean my-model?")


@pytest.mark.parametrize("name", ["label", "text", "row_id", "source_row"])
def test_slices_cannot_hide_a_column(load, name):
    """A slice of a role's name would take the role's place in the table of rows."""
    (found,) = complaints(load, LEAST, f"data.slices=[{name}]")
    assert found == f"--set data.slices: the name is taken, rename the column, got '{name}'"


def test_plain_words_are_text(load):
    """`off`, `no` and dates are what they look like; by YAML 1.1 they would be false, false and a date."""
    config = load(
        LEAST + "validation: {expect: {tokens: {severity: off}, language: {expected: [no, en]}, "
        "labels: {known: [yes, no, 2024-01-01, 5, 007]}}}\n"
        "training: {learning_rate: 3e-5, freeze_embeddings: true}\ndescription: off"
    )
    expect = config.validation.expect
    assert expect.tokens.severity == "off"
    assert expect.language.expected == ("no", "en")
    assert expect.labels.known == ("yes", "no", "2024-01-01", "5", "007")
    assert (config.training.learning_rate, config.training.freeze_embeddings) == (3e-5, True)


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_overrides(load):
    """Values are YAML, sections are made, the last of two wins, a null empties a key."""
    config = load(
        LEAST + "search:\n",
        "training.epochs=1",
        "training.epochs=2",
        "search.space={epochs: {low: 1, high: 3}}",
        "description=a=b",
        "data.slices=[one, two]",
        "model.revision=",
    )
    assert config.training.epochs == 2
    assert config.search.space == {"epochs": Domain(low=1, high=3)}
    assert (config.description, config.data.slices, config.model.revision) == ("a=b", ("one", "two"), None)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("epochs", "--set: must read path.to.key=value, got 'epochs'"),
        ("=3", "--set: must read path.to.key=value, got '=3'"),
        ("training..epochs=3", "--set: must read path.to.key=value, got 'training..epochs=3'"),
        ("name.x=3", "--set name.x: name is a value, not a section, got 'demo'"),
        ("validation.also.0.severity=warn", "also is a list, which can only be set whole"),
        ("training.epochs=[1", "--set training.epochs: the value must be YAML, got '[1'"),
        ("trainig.epochs=1", "--set trainig: unknown key; did you mean training?"),
        ("training.epoch=1", "--set training.epoch: unknown key; did you mean epochs?"),
        ("training=3", "--set training: must be a section of keys and values, got 3"),
    ],
)
def test_bad_overrides(load, override, complaint):
    """A mistake on the command line is told as one of the command line."""
    (found,) = complaints(load, LEAST + "validation: {also: [{expect: e}]}", override)
    assert complaint in found


def test_a_bad_override_hides_no_mistake_of_the_file(load):
    """All mistakes, wherever they stand."""
    assert len(complaints(load, LEAST + "split: {test: 2}", "nonsense", "model.max_length=1")) == 3


# -- search space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ("learning_rate: {low: 0, high: 0.1}", "learning_rate: should be greater than 0, got 0"),
        ("warmup: {low: 0.5, high: 1.5}", "warmup: should be less than or equal to 1, got 1.5"),
        ("batch_size: {choices: [16, 0]}", "batch_size: should be greater than or equal to 1, got 0"),
        ("batch_size: {low: 8, high: 64.5}", "batch_size: should be a valid integer"),
        ("optimizer: {choices: [adamw, lion]}", "optimizer: should be 'adamw' or 'sgd', got 'lion'"),
        ("optimizer: {low: 1, high: 2}", "optimizer: should be 'adamw' or 'sgd', got 1"),
        ("epochs: {low: 3, high: 1}", "epochs: low must be below high, got low 3 and high 1"),
        ("epochs: {low: 3}", "epochs: needs low and high, or choices"),
        ("epochs: {low: 1, high: 2, choices: [1, 2]}", "epochs: takes low and high, or choices, not both"),
        ("weight_decay: {low: 0, high: 0.1, log: true}", "a logarithmic range must start above 0, got 0"),
        ("epochs: {choices: [1]}", "epochs → choices: needs at least 2 entries, got [1]"),
        ("epochs: {low: few, high: 3}", "epochs → low: must be a number, got 'few'"),
        ("epochs: 3", "epochs: must be a section of keys and values, got 3"),
        ("epochs: {low: .nan, high: 3}", "epochs → low: "),
    ],
)
def test_space_is_checked_against_the_training_fields(load, space, complaint):
    """What no trial could be trained with is refused before the night, not in its third hour."""
    found = complaints(load, LEAST + f"search: {{space: {{{space}}}}}")
    assert any(complaint in line for line in found), found


def test_a_range_takes_the_type_of_its_field(load):
    """Rows of a batch are whole numbers, however they are written; a whole range of a fraction stays whole."""
    space = load(
        LEAST + "search: {space: {batch_size: {low: 8.0, high: 64.0}, epochs: {low: 1, high: 3}, "
        "learning_rate: {choices: ['1e-5', 2e-5]}, dropout: {choices: [null, 0.2]}}}"
    ).search.space
    assert (space["batch_size"].low, type(space["batch_size"].low)) == (8, int)
    assert (space["epochs"].low, type(space["epochs"].low)) == (1, int)
    assert space["learning_rate"].choices == (1e-5, 2e-5)
    assert space["dropout"].choices == (None, 0.2)


def test_nothing_to_search_for_is_one_trial(load):
    """Ten trials with the same settings and seed would be ten times the same run."""
    assert load(LEAST).search.wanted == 1
    assert load(LEAST, "search.space={epochs: {low: 1, high: 2}}", "search.trials=4").search.wanted == 4


def test_with_parameters_keeps_the_rest():
    """A trial's parameters replace those of the config and nothing else."""
    changed = with_parameters(Training(epochs=7), {"batch_size": 8})
    assert asdict(changed) == asdict(Training(epochs=7)) | {"batch_size": 8}


# -- hash, round trip, schema ------------------------------------------------------------------------------------------

OTHER_VALUES = {
    "name": "other",
    "model": {"base": "b", "revision": "v1"},
    "data": {"source": "s", "sample": 50},
    "validation": {"max_refused": 0.5},
    "split": {"test": 0.2},
    "training": {"seed": 18},
    "search": {"trials": 3},
    "evaluation": {"confidence": 0.9},
}


def make(**changes) -> Config:
    return Config.model_validate({"name": "demo", "model": {"base": "b"}, "data": {"source": "s"}, **changes})


UNTRAINED = {"description", "promotion", "schedule", "notify", "retention", "monitor"}


def test_hash_ignores_what_does_not_train():
    """A new description, rule of promotion, schedule or address is no reason to train again."""
    lived_with = {
        "description": "x",
        "promotion": {"mode": "manual", "floor": 0.9},
        "schedule": {"cron": "0 2 * * *", "timezone": "Europe/Berlin"},
        "notify": [{"to_env": "HOOK"}],
        "retention": {"nights": 3},
        "monitor": {"window": 50},
    }
    assert set(lived_with) == UNTRAINED
    assert config_hash(make(**lived_with)) == config_hash(make())


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ({"schedule": {"cron": "0 25 * * *"}}, "cron"),
        ({"schedule": {"cron": "0 0 30 2 *"}}, "cron"),
        ({"schedule": {"cron": "0 2 * * *", "timezone": "Europe/Berlim"}}, "time zone"),
        ({"notify": [{"to_env": "https://hooks.example.com/T0/secret"}]}, "environment variable"),
    ],
)
def test_how_a_model_is_lived_with_is_checked(section, wrong):
    """A cron expression that never occurs, an unknown zone, an address with its secret in the file."""
    with pytest.raises(ValueError, match=wrong):
        make(**section)


@pytest.mark.parametrize("key", sorted(set(Config.model_fields) - UNTRAINED - {"problem"}))
def test_hash_changes_with_everything_else(key):
    """Every other section counts; a section added to the config fails here until it is given another value above."""
    assert config_hash(make(**{key: OTHER_VALUES[key]})) != config_hash(make())


def test_hash_does_not_depend_on_how_a_value_is_written():
    """A default written out, another order of keys, 3 for 3.0: the same config."""
    spelt = make(training={"seed": 17, "epochs": 3}, search={"trials": 10})
    assert config_hash(spelt) == config_hash(make())


def test_config_is_frozen():
    """Nobody changes the config while the night runs."""
    with pytest.raises(ValidationError):
        make().search.trials = 3


numbers = st.floats(1e-6, 1, allow_nan=False)
domains = st.one_of(
    st.builds(lambda low, more: {"low": low, "high": low + more}, numbers, st.floats(0.1, 1)),
    st.builds(lambda values: {"choices": values}, st.lists(numbers, min_size=2, max_size=4)),
)
configs = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
        "model": st.fixed_dictionaries({"base": st.text(min_size=1), "max_length": st.integers(8, 8192)}),
        "data": st.fixed_dictionaries({"source": st.text(), "slices": st.lists(st.text(max_size=5), max_size=2)}),
    },
    optional={
        "description": st.text(),
        "split": st.fixed_dictionaries({"test": st.floats(0.01, 0.49), "validation": st.floats(0.01, 0.49)}),
        "training": st.fixed_dictionaries({}, optional={"epochs": numbers, "seed": st.integers(0, 10**6)}),
        "search": st.fixed_dictionaries(
            {}, optional={"trials": st.integers(1, 99), "space": st.dictionaries(st.just("learning_rate"), domains)}
        ),
    },
)


@given(configs)
@settings(max_examples=60, deadline=None)
def test_round_trip(facts):
    """What a config says of itself makes the same config, also through JSON: a night keeps it so."""
    config = Config.model_validate(facts)
    again = Config.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert config_hash(again) == config_hash(config)


keys = st.sampled_from([*Config.model_fields, "space", "epochs", "base", "low", "x"]) | st.integers()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@given(anything)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_yaml_breaks_the_reader(load, facts):
    """Whatever stands in the file: a config, or complaints of one line; never another exception."""
    try:
        load(yaml.safe_dump(facts))
    except UserError as error:
        assert error.complaints
        assert all("\n" not in str(complaint) for complaint in error.complaints)


def test_every_key_says_what_it_means():
    """The schema is the documentation: no key without a sentence, but those that have a section of their own."""
    definitions = json_schema()["$defs"]
    mute = [
        f"{section}.{key}"
        for section, facts in definitions.items()
        for key, value in facts["properties"].items()
        if not value.get("description") and "$ref" not in value
    ]
    assert not mute

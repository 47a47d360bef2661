"""Settings: round trips, overrides and errors."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedgan import config
from fedgan.config import Settings, describe, from_dict, load_scenario, to_dict
from fedgan.errors import ConfigError
from fedgan.run_folder import RunFolder

KEYS = [setting.key for setting in describe()]


def field_of(key: str) -> tuple[dataclasses.Field[Any], Any]:
    """The dataclass field of a dotted key, and its type."""
    owner: type = Settings
    *sections, name = key.split(".")
    for section in sections:
        owner = typing.cast(type, typing.get_type_hints(owner)[section])
    return next(
        item for item in dataclasses.fields(owner) if item.name == name
    ), typing.get_type_hints(owner)[name]


def value_strategy(key: str) -> st.SearchStrategy[Any]:
    """Values within the limits of the key."""
    item, hint = field_of(key)
    low, high, choices = (item.metadata[name] for name in ("low", "high", "choices"))
    if key == "data.resolution":
        return st.sampled_from([16, 32, 64, 128, 256, 512, 1024])
    if typing.get_origin(hint) is tuple:
        words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
        other = words if typing.get_args(hint)[0] is str else st.integers(1, 10**6)
        inner = st.sampled_from(choices) if choices else other
        return st.lists(inner, min_size=1, max_size=4, unique=True).map(tuple)
    if choices:
        return st.sampled_from(choices)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(int(low or 0), int(high if high is not None else 10**6))
    if hint is float:
        return st.floats(
            low if low is not None else -1e6, high if high is not None else 1e6, allow_nan=False
        )
    return st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


def replaced(settings: Settings, key: str, value: Any) -> Settings:
    section, dot, name = key.partition(".")
    if not dot:
        return dataclasses.replace(settings, **{section: value})
    return dataclasses.replace(
        settings, **{section: dataclasses.replace(getattr(settings, section), **{name: value})}
    )


def get(settings: Settings, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


@st.composite
def any_settings(draw: st.DrawFn) -> Settings:
    """Settings with some changed keys that satisfy `validate`."""
    settings = Settings()
    for key in draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=8)):
        changed = replaced(settings, key, draw(value_strategy(key)))
        try:
            settings = config.validate(changed)
        except ConfigError:  # this value breaks a rule over several keys: skip it
            continue
    return settings


@given(any_settings())
def test_settings_round_trip_through_a_dict(settings: Settings) -> None:
    assert from_dict(to_dict(settings)) == settings


@given(any_settings())
def test_settings_round_trip_through_toml(settings: Settings) -> None:
    assert from_dict(tomllib.loads(tomli_w.dumps(to_dict(settings)))) == settings


def test_run_folder_reads_the_settings_it_wrote(tmp_path: Path) -> None:
    settings = replaced(Settings(name="Wörter"), "federation.exchange", ("generator",))
    RunFolder(tmp_path).write_settings(settings)
    assert RunFolder(tmp_path).settings() == settings


@pytest.mark.parametrize(("line", "found"), [("", "none"), ("format = 1\n", "1")])
def test_run_folder_of_another_format_is_refused(tmp_path: Path, line: str, found: str) -> None:
    run = RunFolder(tmp_path)
    run.write_settings(Settings())
    run.config.write_text(run.config.read_text().replace(f"format = {config.FORMAT}\n", line))
    with pytest.raises(ConfigError, match=f"config.toml has format {found}, .* start a new run"):
        run.settings()


def test_config_of_a_run_is_a_scenario(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_settings(Settings(name="again"))
    assert load_scenario(tmp_path / "config.toml").name == "again"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_meaning_and_can_be_overridden(key: str, tmp_path: Path) -> None:
    item, hint = field_of(key)
    assert item.metadata["meaning"].endswith(".")
    scenario = tmp_path / "empty.toml"
    scenario.write_text("")
    value = item.default
    text = (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if hint is bool
        else str(value)
    )
    assert get(load_scenario(scenario, [f"{key}={text}"]), key) == value


@pytest.mark.parametrize("value", ["7", '"seven"', "true", "[1, 2]", "0.5"])
@pytest.mark.parametrize("key", KEYS)
def test_value_has_the_right_type_or_is_refused(key: str, value: str, tmp_path: Path) -> None:
    scenario = tmp_path / "empty.toml"
    scenario.write_text("")
    _, hint = field_of(key)
    found, complaint = None, ""
    try:
        found = get(load_scenario(scenario, [f"{key}={value}"]), key)
    except ConfigError as error:
        complaint = str(error)
    assert len(complaint.splitlines()) <= 1
    assert complaint or isinstance(found, typing.get_origin(hint) or hint)
    assert not (hint is int and isinstance(found, bool))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.kimg=100", 100.0),
        ("training.kimg = 2.5", 2.5),
        ("federation.strategy=fedprox", "fedprox"),
        ("federation.exchange=generator,ema", ("generator", "ema")),
        ('federation.exchange=["ema"]', ("ema",)),
        ("augment.mirror=true", True),
        ("name=42", "42"),
    ],
)
def test_override_is_parsed_by_the_type_of_its_key(
    override: str, expected: Any, tmp_path: Path
) -> None:
    scenario = tmp_path / "empty.toml"
    scenario.write_text("")
    assert get(load_scenario(scenario, [override]), override.partition("=")[0].strip()) == expected


def test_later_override_wins(tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text("[training]\nkimg = 3\n")
    assert load_scenario(scenario).training.kimg == 3
    assert load_scenario(scenario, ["training.kimg=4", "training.kimg=5"]).training.kimg == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.kimgs=3", ["training.kimgs", "did you mean 'training.kimg'"]),
        ("kimg=3", ["kimg", "did you mean 'training.kimg'"]),
        ("federation.batch_size=3", ["did you mean 'training.batch_size'"]),
        ("data=3", ["unknown key 'data'"]),
        ("training.kimg", ["no setting", "key=value"]),
        ("federation.strategy=fedavgg", ["must be one of", "did you mean 'fedavg'"]),
        ("data.resolution=48", ["data.resolution = 48", "power of two", "nearest"]),
        ("data.resolution=8", ["data.resolution", "16"]),
        ("data.resolution=4096", ["data.resolution", "1024"]),
        ("training.batch_size=0", ["training.batch_size", "from 1 to 65536"]),
        ("training.batch_size=2.5", ["training.batch_size", "whole number"]),
        ("training.batch_size=true", ["training.batch_size", "whole number"]),
        ("training.batch_size=18", ["minibatch_std_group"]),
        ("training.kimg=nan", ["training.kimg", "finite"]),
        ("training.kimg=inf", ["training.kimg", "finite"]),
        ("training.style_mixing=1.5", ["from 0 to 1"]),
        ("training.kimg=-1", ["training.kimg", "from 0.001 to"]),
        ("training.kimg=0.1", ["a round would show"]),
        ("federation.exchange=", ["federation.exchange is empty"]),
        ("federation.exchange=generator,weights", ["weights", "must be one of"]),
        ("data.partition=quantities", ["data.quantities", "one per hospital"]),
        (f"seed={10**30}", ["seed = 10000", "from 0 to 2147483647"]),
        (f"seed={2**63}", ["seed = 9223372036854775808", "from 0 to 2147483647"]),
        (f"seed=0x{'f' * 5000}", ["seed = a number of 20000 bits", "from 0 to"]),
        (f"seed={'9' * 5000}", ["seed = '999", "whole number"]),
        ("seed=²", ["seed = '²'", "whole number"]),
        (f"training.kimg={10**400}", ["training.kimg = inf", "finite"]),
        (f"training.kimg=0x{'f' * 5000}", ["training.kimg = inf", "finite"]),
        (f"data.quantities=[-{10**30}]", ["data.quantities", "from -2147483647 to"]),
        (f"data.quantities=0x{'f' * 5000}", ["data.quantities = '0xfff", "whole number"]),
        (f"federation.rounds={2**40}", ["federation.rounds", "from 1 to 100000"]),
        (f"model.z_dim={2**31 - 1}", ["model.z_dim", "from 1 to 4096"]),
        (f"data.quantities={'[' * 5000}", ["data.quantities = '[[", "whole number"]),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_wrong_override_names_key_problem_and_fix(
    override: str, words: list[str], tmp_path: Path
) -> None:
    scenario = tmp_path / "empty.toml"
    scenario.write_text("")
    with pytest.raises(ConfigError) as caught:
        load_scenario(scenario, [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[training]\nkimgg = 3\n",
            ["unknown key 'training.kimgg'", "did you mean 'training.kimg'"],
        ),
        ("[trainig]\nkimg = 3\n", ["unknown key 'trainig'"]),
        ("training = 3\n", ["'training'", "is a section"]),
        ("[training\n", ["not a readable TOML file"]),
        ("[training]\nkimg = 'many'\n", ["training.kimg", "must be a number"]),
        ("[federation]\nexchange = 'generator'\n", ["must be a list"]),
        (f"seed = {'[' * 5000}", ["not a readable TOML file", "nested too deeply"]),
        (f"seed = {'{a=' * 5000}", ["not a readable TOML file", "nested too deeply"]),
        (f"seed = {'9' * 5000}", ["not a readable TOML file"]),
        (f"seed = 0x{'f' * 5000}", ["seed = a number of 20000 bits"]),
        (f"{'.'.join('a' * 20000)} = 1", ["more than 4000 dots"]),
        (f"{'a' * 20000} = 1", ["unknown key 'aaaa"]),
        (f"seed = 0  # {' ' * 2**16}", ["more than 64 KiB"]),
        ("seed = [1.0, nan]", ["seed", "whole number"]),
        ("training.kimg = inf", ["training.kimg", "finite"]),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_wrong_scenario_file_is_reported_by_key(
    text: str, words: list[str], tmp_path: Path
) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_scenario(scenario)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unreadable_scenario_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scenario at"):
        load_scenario(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        load_scenario(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        load_scenario(tmp_path)


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parent.parent / "simulations").glob("*.toml")),
    ids=lambda path: path.stem,
)
def test_shipped_scenarios_are_valid(path: Path) -> None:
    assert load_scenario(path).name != Settings().name

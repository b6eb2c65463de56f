"""Options from dataclasses, from YAML files, and the document that lists them."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.cli.harness import CPU, Cli

from llmdoctor.cli import reference
from llmdoctor.cli.fields import FieldsOf, read_settings
from llmdoctor.rewards.store import RewardStore

SOURCES = [
    ("llmdoctor.pairs.make", "PairOptions"),
    ("llmdoctor.rewards.acquire", "ScoringOptions"),
    ("llmdoctor.rewards.acquire", "RewardOptions"),
    ("llmdoctor.tfpo.options", "DoctorOptions"),
    ("llmdoctor.tfpo.config", "TFPOConfig"),
    ("llmdoctor.decoding.request", "SamplingParams"),
    ("llmdoctor.demo", "DemoOptions"),
    ("llmdoctor.shrink.distil", "DistilOptions"),
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "commands.md"


@pytest.mark.parametrize(("module", "name"), SOURCES)
def test_what_is_read_from_the_source_is_what_the_class_has(module: str, name: str) -> None:
    """Names, defaults and annotations; and no field is without a help text."""
    cls = getattr(importlib.import_module(module), name)
    real = {field.name: field for field in dataclasses.fields(cls)}
    settings = read_settings(module, name)
    assert [setting.name for setting in settings] == list(cls.__annotations__)
    for setting in settings:
        assert setting.default == real[setting.name].default
        assert setting.annotation == real[setting.name].type
        assert setting.help, f"{name}.{setting.name} has no help"


def test_fields_of_a_class_of_ours_that_is_extended_follow_with_the_help_written_there() -> None:
    settings = {setting.name: setting for setting in read_settings("llmdoctor.shrink.drafter", "DraftOptions")}
    base = {setting.name: setting for setting in read_settings("llmdoctor.shrink.distil", "DistilOptions")}
    assert list(settings)[:5] == ["tokens", "layers", "lower_layers", "vocabulary", "unroll"]
    assert settings.keys() > base.keys()
    assert settings["held_out"] == base["held_out"]
    assert settings["tokens"] == dataclasses.replace(base["tokens"], default=300000)
    assert settings["batch_tokens"] == dataclasses.replace(base["batch_tokens"], default=512)


def test_fields_are_chosen_in_the_order_asked_for() -> None:
    sampling = FieldsOf("llmdoctor.decoding.request", "SamplingParams", panel="", only=("seed", "top_p"))
    assert [setting.name for setting in sampling.settings] == ["seed", "top_p"]
    rest = FieldsOf("llmdoctor.decoding.request", "SamplingParams", panel="", without=("stop", "seed"))
    assert not {"stop", "seed"} & {setting.name for setting in rest.settings}


# YAML


def rewards_config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_every_kind_of_option_from_a_file_and_what_is_typed_wins(
    good: Cli, tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    config = rewards_config(
        tmp_path,
        f"pairs: {pairs_file}\npatient: {tiny_folder}\noutput: {tmp_path / 'out'}\nfaces: polite\ntau: 2e0\n"
        "theta: 0.25\nsigned: true\nmax-completion-length: none\nshard_size: 3\nlimit: 3\ndimension:\n"
        "dtype: float32\ndevice: cpu\nverbose: false\n",
    )
    good("rewards", "--config", config, "--theta", 0.75, "--limit", 2)
    manifest = RewardStore.open(tmp_path / "out").manifest
    assert manifest["pairs"] == 2
    assert manifest["faces"]["name"] == "polite"
    options = manifest["reward_options"]
    assert (options["tau"], options["theta"], options["signed"]) == (2.0, 0.75, True)
    assert manifest["scoring_options"]["max_completion_length"] is None
    assert manifest["scoring_options"]["shard_size"] == 3


def test_null_is_none_where_an_option_may_be_that_and_else_its_default(
    good: Cli, tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The default of the longest response is 512, not none."""
    config = rewards_config(
        tmp_path,
        f"pairs: {pairs_file}\npatient: {tiny_folder}\noutput: {tmp_path / 'out'}\nfaces: polite\n"
        "max-completion-length: null\nshard-size: null\nlimit: 2\ndtype: float32\ndevice: cpu\n",
    )
    good("rewards", "--config", config)
    scoring = RewardStore.open(tmp_path / "out").manifest["scoring_options"]
    assert (scoring["max_completion_length"], scoring["shard_size"]) == (None, 128)


def test_a_switch_that_is_on_in_the_file_can_be_typed_off(good: Cli, finished: Path, tmp_path: Path) -> None:
    config = rewards_config(
        tmp_path, f"folder: {finished / 'rewards'}\nagreement: yes\noutput: {tmp_path / 'p.html'}\n"
    )
    assert "loading" not in good("inspect", "--config", config, "--no-agreement").err


def test_lists_and_arguments_from_a_file(good: Cli, finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    config = rewards_config(
        tmp_path,
        f"prompt: 'yes'\npatient: {tiny_folder}\nmax-new-tokens: 2\n"
        f"doctor: ['one:{finished / 'doctor'}=1', 'two:{finished / 'doctor'}=0.5']\nstop: 'no'\n",
    )
    assert good("generate", "--config", config, *CPU).err.count("loading the doctor") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 9", "unknown option 'speed'; known: batch-tokens, debug, density, "),
        ("config: x.yaml", "unknown option 'config'"),
        ("tau: many", "Invalid value for '--tau'"),
        ("shard-size: 3.5", "Invalid value for '--shard-size'"),
        ("limit: true", "Invalid value for '--limit'"),
        ("signed: perhaps", "'signed' must be true or false, got 'perhaps'"),
        ("tau: [1, 2]", "'tau' must be a single value, got ['1', '2']"),
        ("max-prompt-length: 1\nmax_prompt_length: 2", "'max_prompt_length' is given twice"),
        ("- tau", "must map option names to values"),
        ("tau: [", "is not YAML"),
        (None, "cannot read the configuration"),
    ],
)
def test_bad_configurations(cli: Cli, tmp_path: Path, text: str | None, message: str) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    ended = cli("rewards", "--config", config, "--pairs", "p", "--faces", "polite", "-o", tmp_path / "out")
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("llmdoctor: error: ")
    assert message in line


@pytest.mark.parametrize("name", [name for name in reference.commands() if not name.startswith("models")])
def test_every_option_has_a_key(name: str, cli: Cli, tmp_path: Path) -> None:
    """The error for an unknown key lists what is known: all long options but --config and --help."""
    config = rewards_config(tmp_path, "no-such-key: 1")
    known = cli(*name.split(), "--config", config).err.rpartition("known: ")[2].strip().split(", ")
    options = {
        spelling.lstrip("-")
        for parameter in reference.commands()[name].params
        for spelling in (parameter.opts if parameter.param_type_name == "option" else [parameter.name])
        if spelling.startswith("--") or parameter.param_type_name == "argument"
    }
    assert set(known) == options - {"config", "help"}


# docs/commands.md


def section(name: str) -> str:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.search(rf"^##+ llmdoctor {name}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/commands.md has no section on {name}"
    return found[1]


def examples(text: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize(("name", "command"), reference.commands().items())
def test_the_document_has_every_option_and_an_example(name: str, command: Any) -> None:
    text = section(name)
    shared = section("demo") and DOCUMENT.read_text(encoding="utf-8").partition("\n## llmdoctor demo")[0]
    for parameter in command.params:
        for spelling in reference.spellings(parameter):
            assert f"`{spelling}`" in text or f"`{spelling}" in shared, f"{spelling} of {name}"
    found = examples(text)
    assert found
    known = {spelling for parameter in command.params for spelling in reference.spellings(parameter)}
    for words in found:
        assert words[: 1 + len(name.split())] == ["llmdoctor", *name.split()]
        assert {word for word in words if word.startswith("-")} <= known, words


def test_the_tables_are_those_of_the_commands() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert reference.with_tables(text) == text, "run: python -m llmdoctor.cli.reference docs/commands.md"

"""Flags, YAML config files and help of all commands, and which settings are valid."""

import re
import subprocess
import sys
import typing
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from conftest import CONFIGS
from processes import ROOT

from engine.config import (
    TrainConfig,
    base_type,
    build_parser,
    fixed_settings,
    flag,
    parse_flags,
    to_yaml,
)
from finetune_lora import FinetuneConfig
from fineweb import PrepareConfig
from hellaswag import EvalConfig
from model import GPTConfig
from sample import SampleConfig
from share import ShareConfig
from train_gpt2 import PretrainConfig

# Settings that a resumed run may change. They affect at most rounding, logging and saving, or they
# are paths: a run compares hashes of its data and weights, not their paths.
FREE_TO_CHANGE = {"out_dir", "resume", "data", "data_dir", "model_name_or_path", "merge_out"}
FREE_TO_CHANGE |= {"batch_size", "device", "compile", "parallel", "recompute", "lora_form"}
FREE_TO_CHANGE |= {"eval_every", "sample_every", "hellaswag_every", "hellaswag_data"}
FREE_TO_CHANGE |= {"log", "save_every", "keep", "patience", "merge_dtype", "profile", "tokenizer"}
FREE_TO_CHANGE |= {"dataset_config", "split", "skip_bad_rows"}
FREE_TO_CHANGE |= {"prompt_column", "completion_column"}
GROUPS = {
    "run": {"out_dir", "resume", "seed"},
    "optimization": {"batch_size", "max_steps", "optimizer", "max_lr", "min_lr", "grad_clip"},
    "evaluation": {"eval_every", "sample_every", "hellaswag_every", "hellaswag_data"},
    "logging": {"log", "save_every", "keep", "profile"},
    "system": {"device", "precision", "compile", "parallel", "recompute"},
}


@dataclass(frozen=True)
class Base:
    """A config with a setting of each kind."""

    number: int = flag(3, "a count of 100%", group="numbers", may_change=True)
    rate: float = flag(1e-5, "a rate")
    name: str = flag("x", "a name", group="texts")
    names: list[str] = flag(["a", "b"], "several names")
    option: Literal["red", "green"] = flag("red", "a color", may_change=True)
    switch: bool = flag(False, "a switch")
    optional: int | None = flag(None, "a count, or none")


@dataclass(frozen=True)
class Derived(Base):
    """Overrides defaults, and in one case the help too."""

    number: int = flag(5)
    rate: float = flag(2.0, "another rate")
    option: Literal["red", "green"] = flag("green")


def parse(config_class: type, *argv: object) -> dict:
    """Return the settings given on a command line."""
    return parse_flags(config_class, "", [str(arg) for arg in argv])[0]


def parsing_error(capsys, config_class: type, *argv: object) -> str:
    """Parse a wrong command line, which must exit with code 2. Return its one-line error."""
    with pytest.raises(SystemExit) as exit_:
        parse(config_class, *argv)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def flags_of(kind: object) -> list:
    """Return the flags of a type in all commands, as pairs of config class and name."""
    return [
        pytest.param(config_class, f.name, id=f"{config_class.__name__}.{f.name}")
        for config_class in CONFIGS.values()
        for f in fields(config_class)
        if kind in (base_type(f.type), typing.get_origin(base_type(f.type)))
    ]


@pytest.mark.parametrize(("config_class", "name"), flags_of(bool))
def test_boolean_flags(capsys, config_class, name):
    """`--x` and `--x true` turn a boolean on; `--no-x` and `--x false` turn it off. Last wins."""
    for argv, expected in (
        ([f"--{name}"], True),
        ([f"--no-{name}"], False),
        ([f"--{name}", "true"], True),
        ([f"--{name}", "false"], False),
        ([f"--{name}=True"], True),
        ([f"--{name}", f"--no-{name}"], False),
        ([f"--no-{name}", f"--{name}"], True),
    ):
        assert parse(config_class, *argv)[name] is expected, argv
    assert "unknown flag maybe" in parsing_error(capsys, config_class, f"--{name}", "maybe")
    assert "unknown flag true" in parsing_error(capsys, config_class, f"--no-{name}", "true")


@pytest.mark.parametrize(("config_class", "name"), flags_of(Literal))
def test_choices(capsys, config_class, name):
    """A flag with choices accepts each of them. For anything else, the error lists them."""
    kind = next(base_type(f.type) for f in fields(config_class) if f.name == name)
    choices = typing.get_args(kind)
    for choice in choices:
        assert parse(config_class, f"--{name}", choice) == {name: choice}
    error = parsing_error(capsys, config_class, f"--{name}", "none-of-them")
    assert f"{name} is none-of-them, expected {' or '.join(choices)}" in error


@pytest.mark.parametrize(("config_class", "name"), flags_of(list))
def test_lists(config_class, name):
    """A list takes all values up to the next flag. A repeated flag adds to it."""
    assert parse(config_class, f"--{name}", "a") == {name: ["a"]}
    assert parse(config_class, f"--{name}", "a", "b c") == {name: ["a", "b c"]}
    assert parse(config_class, f"--{name}", "a", "b", "--debug") == {name: ["a", "b"]}
    repeated = (f"--{name}", "a", "b", "--debug", f"--{name}=", f"--{name}", "b")
    assert parse(config_class, *repeated) == {name: ["a", "b", "", "b"]}


@pytest.mark.parametrize("name", ["log", "lora_module_name"])
def test_lists_with_spaces_or_commas(tmp_path, name):
    """Several names mean the same with spaces, with commas, and as a YAML list."""
    file = tmp_path / "config.yaml"
    file.write_text(f"{name}: [a, b]\n")
    for argv in (
        f"--{name} a b",
        f"--{name} a, b",
        f"--{name} a,b",
        f"--{name}=a,b",
        f"--{name} a --{name}=b",
        f"--config {file}",
    ):
        assert parse_flags(FinetuneConfig, "", argv.split())[0] == {name: "a,b"}


def test_a_list_of_names_has_only_text(tmp_path, capsys):
    """A YAML list of names must hold text, as any other list."""
    file = tmp_path / "config.yaml"
    file.write_text("log: [wandb, 1]\n")
    error = parsing_error(capsys, FinetuneConfig, "--config", file)
    assert "log is ['wandb', 1], expected names" in error


def test_values_have_their_types():
    """Numbers get the declared type, text stays as typed, and flags not given are absent."""
    assert parse(Base) == {}
    values = parse(Base, "--number", "12", "--rate", "3", "--name", "12", "--optional", "null")
    assert values == {"number": 12, "rate": 3.0, "name": "12", "optional": None}
    assert [type(value) for value in values.values()] == [int, float, str, type(None)]
    assert parse(Base, "--name=-x") == {"name": "-x"}


WRONG_VALUES = {
    "number: many": "number is many, expected an integer",
    "number: 1.5": "number is 1.5, expected an integer",
    "number: true": "number is true, expected an integer",
    "number: [1]": "number is [1], expected an integer",
    "number: ['1']": "number is ['1'], expected an integer",
    "number: ''": "number is '', expected an integer",
    "rate: fast": "rate is fast, expected a number",
    "rate: .nan": "rate is .nan, expected a number",
    "rate: -.inf": "rate is -.inf, expected a number",
    "rate: 1" + "0" * 400: "expected a number",
    "name: 5": "name is 5, expected text",
    "names: a": "names is a, expected a list of strings",
    "names: [a, 1]": "names is ['a', 1], expected a list of strings",
    "option: [red]": "option is ['red'], expected red or green",
    "switch: maybe": "switch is maybe, expected true or false",
    "switch: 1": "switch is 1, expected true or false",
    "optional: half": "optional is half, expected an integer or null",
    "numbr: 3": "numbr is not a setting of this command, did you mean number?",
    "1: 3": "1 is not a setting of this command",
    "- number": "holds ['number'], expected lines NAME: VALUE",
    "": "holds None, expected lines NAME: VALUE",
    "number: [1": "cannot be read as YAML",
    "number: 1\nrate: 2\nnumber: 1": "number is on lines 1 and 3; delete one",
    "{name: a, name: b}": "name is on lines 1 and 1; delete one",
    "[name]: a": "cannot be read as YAML",
    "name: !!python/object:os.system x": "cannot be read as YAML",
}


@pytest.mark.parametrize(("content", "expected"), WRONG_VALUES.items(), ids=WRONG_VALUES)
def test_yaml_is_checked_like_flags(tmp_path, capsys, content, expected):
    """Bad values, unknown keys and files without settings are one-line errors naming the file."""
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    error = parsing_error(capsys, Base, "--config", file)
    assert f"{file}" in error
    assert expected in error


def test_yaml_values(tmp_path):
    """A YAML value is converted to the type of its setting."""
    file = tmp_path / "right.yaml"
    for content, expected in {
        "rate: 1e-3": 1e-3,  # text in YAML 1.1, which wants 1.0e-3
        "rate: 2": 2.0,
        "number: 7": 7,
        "rate: 6.0e-04": 6e-4,
        "name: 010": "010",
        "name: 2026-12-01": "2026-12-01",
        "switch: yes": True,
        "switch: 'false'": False,
        "optional: null": None,
        "optional: 4": 4,
        "names: [a, b]": ["a", "b"],
        "name: ''": "",
        "option: green": "green",
    }.items():
        file.write_text(content)
        (value,) = parse(Base, "--config", file).values()
        assert (value, type(value)) == (expected, type(expected))


def test_null_is_accepted_where_none_is_a_value(tmp_path, capsys):
    """A setting accepts YAML null if its type or default allows None, and otherwise refuses it."""
    file = tmp_path / "null.yaml"
    for config_class in CONFIGS.values():
        for f in fields(config_class):
            file.write_text(f"{f.name}: null\n")
            if f.default is None or type(None) in typing.get_args(f.type):
                assert parse(config_class, "--config", file) == {f.name: None}
            else:
                error = parsing_error(capsys, config_class, "--config", file)
                assert f"{f.name} is null, expected" in error


def test_files_that_cannot_be_read(tmp_path, capsys):
    """If a file does not exist, is a folder or is not UTF-8, the error names it and says so."""
    (tmp_path / "latin1.yaml").write_bytes("name: café".encode("latin-1"))
    for name, expected in (
        ("nothing.yaml", "No such file"),
        ("", "Is a directory"),
        ("latin1.yaml", "cannot be read as YAML"),
    ):
        error = parsing_error(capsys, Base, "--config", tmp_path / name)
        assert f"{tmp_path / name}" in error
        assert expected in error


def test_yaml_is_utf8_on_any_machine(tmp_path):
    """A config file is read as UTF-8, whatever the machine's locale."""
    (tmp_path / "utf8.yaml").write_bytes("name: café 日本\n".encode())
    program = (
        "import pathlib, sys; from engine.config import read_yaml\n"
        "print(ascii(read_yaml(pathlib.Path(sys.argv[1]))['name']))"
    )
    # With these options, falling back on the encoding of the locale is an error.
    options = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    command = [sys.executable, *options, "-c", program, tmp_path / "utf8.yaml"]
    assert subprocess.check_output(command, cwd=ROOT, text=True).strip() == ascii("café 日本")


def test_the_command_line_wins(tmp_path):
    """A flag overrides --config, even if it comes first. A later file overrides an earlier one."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("number: 1\nrate: 0.5\nname: first\n")
    second.write_text("rate: 0.25\nname: second\nnames: [second]\n")
    files = ["--config", first, "--config", second]
    flags = ["--name", "flag", "--names", "flag"]
    expected = {"number": 1, "rate": 0.25, "name": "flag", "names": ["flag"]}
    assert parse(Base, *files, *flags) == expected
    assert parse(Base, *flags, *files) == expected


def test_debug_is_not_a_setting():
    """--debug is returned separately from the settings."""
    assert parse_flags(Base, "", ["--debug", "--number", "1"]) == ({"number": 1}, True)
    assert parse_flags(Base, "", []) == ({}, False)


def test_unknown_flags_suggest_a_near_one(capsys):
    """The error for an unknown flag suggests a similar one. Stray words are errors, too."""
    for argv, expected in {
        ("--max_stepz", "3"): "unknown flag --max_stepz, did you mean --max_steps?",
        ("--max-stepz", "3"): "unknown flag --max-stepz, did you mean --max_steps?",
        ("--warmup_step=3",): "unknown flag --warmup_step=3, did you mean --warmup_steps?",
        ("--qqqq",): "unknown flag --qqqq (-h lists the flags)",
        ("surplus",): "unknown flag surplus",
        ("--max_steps",): "expected one argument",
    }.items():
        assert expected in parsing_error(capsys, PretrainConfig, *argv)


def test_flags_with_dashes():
    """`--max-steps` means `--max_steps`; `--no-use-lora` works, too. Values keep their dashes."""
    values = parse(PretrainConfig, "--max-steps", "3", "--eval-every=4", "--data-dir=my-data")
    assert values == {"max_steps": 3, "eval_every": 4, "data_dir": "my-data"}
    assert parse(FinetuneConfig, "--no-use-lora") == {"use_lora": False}


def test_whole_numbers_in_any_notation(tmp_path, capsys):
    """1e3, 1_000, 1000.0 and 01000 are accepted as integers, but 1.5 is not. They mean the same in
    a YAML file, where 01000 and 1:30 could be in base 8 and 60. Large ones stay exact.
    """
    for text in ("1e3", "1_000", "1000.0", "1E+3", "01000"):
        assert parse(PretrainConfig, "--max_steps", text) == {"max_steps": 1000}
        (tmp_path / "a.yaml").write_text(f"max_steps: {text}\n")
        assert parse(PretrainConfig, "--config", tmp_path / "a.yaml") == {"max_steps": 1000}
    assert parse(PretrainConfig, "--seed", str(2**62 + 1)) == {"seed": 2**62 + 1}
    for text in ("1.5", "1e400", "nan", "1e", "0x10", "0o10", "1:30", "1:30.5"):
        (tmp_path / "a.yaml").write_text(f"max_steps: {text}\n")
        for argv in (("--max_steps", text), ("--config", tmp_path / "a.yaml")):
            error = parsing_error(capsys, PretrainConfig, *argv)
            assert f"max_steps is {text}, expected an integer" in error


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_abbreviations_are_refused(capsys, config_class):
    """Abbreviated flags are unknown. Otherwise a new flag could change what an old script means."""
    names = {f.name for f in fields(config_class)}
    for short in {name[:-1] for name in names} - names:
        for value in (["1"], []):
            error = parsing_error(capsys, config_class, f"--{short}", *value)
            assert f"unknown flag --{short}" in error


@pytest.mark.parametrize("config_class", CONFIGS.values())
@pytest.mark.parametrize("columns", [60, 240])
def test_help(monkeypatch, config_class, columns):
    """The help fits the terminal and has every flag, description and numeric default."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = build_parser(config_class, "What it does.").format_help()
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    no_spaces = "".join(words.split())  # for help texts, because argparse wraps after a hyphen
    assert all(part in words for part in ("What it does.", "--config FILE", "--debug"))
    for action in build_parser(config_class, "")._actions:
        assert len(action.help) > 5
        assert "".join(action.help.replace("%%", "%").split()) in no_spaces
    for f in fields(config_class):
        assert re.search(rf"--{f.name}\b", words)
        if isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
            assert f"(default: {f.default})" in words


@pytest.mark.parametrize("config_class", [PretrainConfig, FinetuneConfig])
def test_help_is_grouped(config_class):
    """The help of a training command has groups. A flag with a new default stays in its group."""
    groups = {group.title: group for group in build_parser(config_class, "")._action_groups}
    flags = {title: {a.dest for a in group._group_actions} for title, group in groups.items()}
    own = {"data": {"data_dir"}, "model": {"init_from", "n_layer", "block_size"}}
    if config_class is FinetuneConfig:
        own = {"data": {"data"}, "model": {"model_name_or_path"}, "LoRA": {"lora_dim", "use_lora"}}
    for title, names in {**GROUPS, **own, "options": {"help", "config", "debug"}}.items():
        assert names <= flags[title], title


def test_overriding_a_default_keeps_the_rest():
    """A field that only overrides a default keeps its help, its group and whether it may change."""
    assert fixed_settings(Base) == {"rate", "name", "names", "switch", "optional"}
    assert fixed_settings(Derived) == fixed_settings(Base)
    words = " ".join(build_parser(Derived, "").format_help().split())
    for text in ("a count of 100% (default: 5)", "another rate (default: 2.0)"):
        assert text in words
    for text in ("a color (default: green)", "several names (default: a b)", "(default: false)"):
        assert text in words
    assert words.count("numbers:") == words.count("texts:") == 1
    assert (Derived().number, Derived().rate, Derived().option) == (5, 2.0, "green")
    assert Base().names is not Base().names


def test_a_field_without_flag_is_refused():
    """A config field without help raises KeyError, because that is a bug in the program."""

    @dataclass(frozen=True)
    class Undeclared(Base):
        extra: int = 3

    with pytest.raises(KeyError, match=r"Undeclared\.extra has no help; declare it as flag"):
        build_parser(Undeclared, "")


def test_what_a_resumed_run_may_change():
    """In both training commands, exactly the settings in FREE_TO_CHANGE may change on resume."""
    free = {}
    for config_class in (TrainConfig, PretrainConfig, FinetuneConfig):
        names = {f.name for f in fields(config_class)}
        free[config_class] = names - fixed_settings(config_class)
        assert free[config_class] == FREE_TO_CHANGE & names
    assert free[PretrainConfig] | free[FinetuneConfig] == FREE_TO_CHANGE


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig(),
        PretrainConfig(out_dir="läufe/日本: # 1", max_lr=1e-3, compile=False, n_layer=3),
        PretrainConfig(precision="bf16", hellaswag_data="null.jsonl", zero_residual=True),
        FinetuneConfig(),
        FinetuneConfig(use_lora=False, max_lr=1e-5, weight_decay=1e-20),
        FinetuneConfig(lora_dim=4, lora_alpha=1.5, use_rslora=True, data="yes", merge_out="3"),
        EvalConfig(limit=3, skip_bad_rows=True),
        SampleConfig(stop=["\n", "é", "- a"], top_k=None, prompt=["\ttab", ""]),
        PrepareConfig(dataset=["a.txt", "b.txt"]),
        ShareConfig(run="runs/x", repo_id="me/x", license="mit", best=True),
        Base(),
    ],
)
def test_yaml_reads_back(tmp_path, config):
    """A config written as YAML and read back with --config is the same config."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    values = parse(type(config), "--config", file)
    assert type(config)(**values) == config
    assert values.keys() == {f.name for f in fields(config)}


def test_presets_are_valid():
    """Every preset is valid, and gpt2_124m equals the defaults, with GPTConfig's default shape."""
    presets = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(presets) >= 5
    for preset in presets:
        config_class = FinetuneConfig if preset.stem.endswith("_lora") else PretrainConfig
        config = config_class(**parse(config_class, "--config", preset))
        if preset.stem == "gpt2_124m":
            names = ("n_layer", "n_head", "n_embd", "block_size")
            shape = {name: getattr(GPTConfig(), name) for name in names}
            assert config == PretrainConfig(**shape)


WRONG_SETTINGS = [
    ({"max_steps": 0}, "max_steps is 0, expected at least 1"),
    ({"n_embd": 10**13}, "expected at least 1 and at most 1,000,000,000,000"),
    ({"warmup_steps": -1}, "warmup_steps is -1, expected at least 0"),
    ({"muon_weight_decay": -0.5}, "muon_weight_decay is -0.5, expected at least 0"),
    ({"seed": 2**63}, "expected at least 0 and at most 9,223,372,036,854,775,807"),
    ({"min_lr": 0.1, "max_lr": 0.01}, "min_lr is 0.1, expected at most max_lr 0.01"),
    ({"max_lr": 1e-5}, "min_lr is 6e-05 by default, expected at most max_lr 1e-05; set a lower"),
    ({"max_lr": -1.0}, "max_lr is -1.0, expected above 0"),
    ({"min_lr": 0.0, "max_lr": 0.0}, "max_lr is 0.0, expected above 0"),
    ({"decay_fraction": 1.5}, "decay_fraction is 1.5, expected at least 0 and at most 1"),
    ({"out_dir": ""}, "out_dir is empty, expected text"),
    ({"beta1": -0.1}, "beta1 is -0.1, expected at least 0 and below 1"),
    ({"beta2": 1.0}, "beta2 is 1.0, expected at least 0 and below 1"),
    ({"muon_beta2": -0.1}, "muon_beta2 is -0.1, expected at least 0 and below 1"),
    ({"log": "tensorbord"}, "log is tensorbord, expected tensorboard, wandb, or both"),
    ({"zero_residual": True, "init_from": "gpt2"}, "zero_residual does not work with init_from"),
    ({"sinusoidal_wpe": 0.1, "init_from": "gpt2"}, "sinusoidal_wpe does not work with init_from"),
]


@pytest.mark.parametrize(("settings", "expected"), WRONG_SETTINGS)
def test_impossible_settings(settings, expected):
    """A setting out of its range is an error, and so are settings that contradict each other."""
    with pytest.raises(ValueError, match=re.escape(expected)):
        PretrainConfig(**settings)


def test_wsd_does_not_use_min_lr():
    """With schedule wsd, max_lr may be below the default of min_lr, which only cosine uses."""
    assert PretrainConfig(schedule="wsd", max_lr=1e-5).max_lr < PretrainConfig.min_lr


def test_a_missing_logger_names_the_command_that_installs_it(tmp_path, monkeypatch):
    """A missing logger is an error with the pip command, even if a folder has the logger's name."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="log is wandb, but wandb is missing: pip install wandb"):
        PretrainConfig(log="wandb")
    assert PretrainConfig(log="").loggers == []


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    """A path that begins with ~/ is in the home folder, from the command line and in YAML, where no
    shell expands it. Text to continue stays as it is.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("prompt_file: ~/a/b.txt\n")
    given = ["--model=~/m", "--prompt", "~/x is", "--stop", "~"]
    config = ["--config", str(tmp_path / "c.yaml")]
    values, _ = parse_flags(SampleConfig, "", [*config, *given])
    expected = {"model": f"{tmp_path}/m", "prompt_file": f"{tmp_path}/a/b.txt"}
    assert values == {**expected, "prompt": ["~/x is"], "stop": ["~"]}

"""Command-line flags, YAML config files, and the settings of a training run."""

import argparse
import importlib.util
import io
import json
import logging
import math
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from operator import ge, gt, le, lt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NewType, NoReturn, TypeVar

import yaml

from engine.errors import describe_error, exit_with_error, run_and_report_errors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Precision = Literal["fp32", "bf16", "fp16"]
Names = NewType("Names", str)  # several names, joined by commas
TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false"}
TYPE_NAMES |= {str: "text", Names: "names"}
HELP_COLUMN = 30  # where the help text starts
LIMITS = {"at_least": ge, "at_most": le, "above": gt, "below": lt}
# Limits of numeric flags that set none. An integer above 10**12 must be a typo.
DEFAULT_LIMITS = {int: {"at_least": 1, "at_most": 10**12}, float: {"at_least": 0}}
MAX_SEED = 2**63 - 1  # the largest seed that torch takes
LOGGERS = ("tensorboard", "wandb")
# Help shared by the flags that take a model. docs/formats.md has the details.
MODEL_HELP = "hub name, Hugging Face folder, checkpoint or run folder"
ADAPTER_HELP = "adapter to add to the model: hub name, PEFT folder, checkpoint, run or lora.pt"
TOKENIZER_HELP = "folder or hub name of the model's tokenizer (default: the one beside the model)"


def flag(
    default: Any, help_text: str = "", *, group: str = "", may_change: bool = False, **limits: float
) -> Any:
    """A dataclass field that is also a command-line flag and a YAML key.

    The type of the field determines what the flag takes:

        Literal["a", "b"]        one of these choices
        list[str], Names         one or more values
        bool                     true, false or nothing: --x, --no-x
        x: int = flag(None)      None means "not set": the command fills it in
        x: int | None            None ("null") is a value that may stay

    `group` starts a new section of the help. `may_change` lets a resumed run have another value.
    `limits` are bounds, such as at_least=1 (see LIMITS; default: DEFAULT_LIMITS). A field without
    `help_text` keeps the metadata of the field that it overrides.
    """
    metadata = {"help": help_text, "group": group, "may_change": may_change, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of a command. Raises ValueError if one is outside the limits of its flag."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, limits = getattr(self, f.name), find_metadata(type(self), f.name)["limits"]
            limits = limits or DEFAULT_LIMITS.get(base_type(f.type), {})
            if value == "" and f.default:  # text that has a default may not be empty
                raise ValueError(f"{f.name} is empty, expected text")
            if value is not None and not all(LIMITS[k](value, n) for k, n in limits.items()):
                expected = (f"{k.replace('_', ' ')} {n:,}" for k, n in limits.items())
                raise ValueError(f"{f.name} is {value}, expected {' and '.join(expected)}")


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model of a command that evaluates or samples one."""

    model: str = flag("gpt2", MODEL_HELP)
    lora_load_path: str | None = flag(None, ADAPTER_HELP)
    tokenizer: str | None = flag(None, TOKENIZER_HELP)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of every training run. The defaults are those of GPT-3 124M, as in build-nanogpt."""

    out_dir: str = flag("runs/gpt2_124m", "run folder", group="run", may_change=True)
    resume: Literal["auto", "never"] = flag("auto", "resume the run in out_dir", may_change=True)
    seed: int = flag(1337, "seed of weights, data order and samples", at_least=0, at_most=MAX_SEED)
    # May change, because a resumed run compares the tokens of its data.
    tokenizer: str | None = flag(None, TOKENIZER_HELP, may_change=True)

    batch_size: int = flag(
        64, "sequences per device and micro-step", group="optimization", may_change=True
    )
    max_steps: int = flag(19_073, "optimizer steps; 19,073 x 524,288 tokens are 10B")
    warmup_steps: int = flag(715, "steps of linear warmup; 375M tokens in GPT-3", at_least=0)
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "muon: Muon for the matrices of the blocks, AdamW for the rest"
    )
    schedule: Literal["cosine", "wsd"] = flag(
        "cosine", "after warmup: a cosine to min_lr; or (wsd) constant, then linear to 0"
    )
    max_lr: float = flag(6e-4, "peak learning rate", above=0)
    min_lr: float = flag(6e-5, "final learning rate of cosine")
    decay_fraction: float = flag(
        0.4, "fraction of steps in which wsd decays", at_least=0, at_most=1
    )
    beta1: float = flag(0.9, "AdamW: decay rate of the mean gradient", at_least=0, below=1)
    beta2: float = flag(0.95, "AdamW: decay rate of the mean squared gradient", at_least=0, below=1)
    weight_decay: float = flag(0.1, "AdamW: weight decay of tensors with two or more dimensions")
    muon_lr: float = flag(0.02, "Muon: peak learning rate; the schedule is the same")
    muon_beta2: float = flag(0.0, "NorMuon: decay rate; 0 is plain Muon", at_least=0, below=1)
    muon_weight_decay: float = flag(0.0, "Muon: weight decay")
    grad_clip: float = flag(1.0, "maximum gradient norm; 0 disables clipping")

    eval_every: int = flag(250, "steps between evaluations", group="evaluation", may_change=True)
    patience: int | None = flag(
        None, "end after N evaluations in a row without a new best loss", may_change=True
    )
    sample_every: int = flag(250, "steps between samples; 0: none", may_change=True, at_least=0)
    hellaswag_every: int = flag(
        0, "steps between HellaSwag evaluations; 0: none", may_change=True, at_least=0
    )
    hellaswag_data: str | None = flag(
        None, "file or hub name of HellaSwag rows (default: Rowan/hellaswag)", may_change=True
    )

    log: Names = flag("", "tensorboard, wandb or both", group="logging", may_change=True)
    save_every: int = flag(1000, "steps between checkpoints", may_change=True)
    keep: int = flag(2, "latest checkpoints to keep, besides the best", may_change=True)
    save_best: ClassVar[bool] = False  # whether to save the weights of the best evaluation
    profile: int = flag(0, "steps to profile into a trace; 0: none", may_change=True, at_least=0)

    device: str = flag("auto", "auto, cpu, cuda or mps", group="system", may_change=True)
    precision: Precision = flag(
        None,
        "fp32, or autocast to 16 bits (default: bf16 if the device has bf16 units, else fp16 on "
        "CUDA, fp32 elsewhere)",
    )
    compile: bool = flag(None, "torch.compile the step (default: on CUDA)", may_change=True)
    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp", "on several devices: replicate the model, or shard it (FSDP2)", may_change=True
    )
    recompute: Literal["none", "light", "block"] = flag(
        "none",
        "activation checkpointing: light recomputes LayerNorm and GELU (2/3 of the memory, almost "
        "free), block recomputes attention and MLP (1/7 of the memory, slower)",
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.loggers:
            if name not in LOGGERS:
                raise ValueError(f"log is {self.log}, expected {', '.join(LOGGERS)}, or both")
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a plain folder of that name has no origin
                raise ValueError(f"log is {self.log}, but {name} is missing: pip install {name}")
        is_min_lr_used = self.schedule == "cosine" and self.max_lr is not None
        if is_min_lr_used and self.min_lr > self.max_lr:
            origin = " by default" if self.min_lr == type(self).min_lr else ""
            raise ValueError(
                f"min_lr is {self.min_lr}{origin}, expected at most max_lr {self.max_lr}; set a "
                "lower min_lr or a higher max_lr"
            )

    def is_due(self, every: int, step: int) -> bool:
        """Return whether `step` is a multiple of `every`, or the last step. 0 is never due."""
        return every > 0 and (step % every == 0 or step == self.max_steps)

    def is_any_evaluation_due(self, step: int) -> bool:
        intervals = self.eval_every, self.sample_every, self.hellaswag_every
        return any(self.is_due(every, step) for every in intervals)

    @property
    def loggers(self) -> list[str]:
        return [name.strip() for name in self.log.split(",") if name.strip()]


def run_command(main: Callable[[Config], None], config_class: type[Config], doc: str) -> None:
    """Call `main` with a `config_class` built from the command line. Report usage errors, a
    ValueError or an OSError in one line, and exit with code 2.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show every sample
    values, debug = parse_flags(config_class, doc)
    if debug:  # print when each part of the command is done
        logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d ms: %(message)s")
    logging.root.info("imports done")
    run_and_report_errors(lambda: main(config_class(**values)), debug)


class Parser(argparse.ArgumentParser):
    """argparse with this project's help and error format, and --debug."""

    def __init__(self, doc: str, **options: Any):
        help_format = partial(argparse.HelpFormatter, max_help_position=HELP_COLUMN)
        options |= {"allow_abbrev": False, "formatter_class": help_format}
        super().__init__(description=doc, **options)
        self.add_argument("--debug", action="store_true", help="show tracebacks and times")

    def error(self, message: str) -> NoReturn:
        exit_with_error(f"{message} (-h lists the flags)")


def parse_flags(
    config_class: type[Config], doc: str, argv: Sequence[str] | None = None
) -> tuple[dict[str, Any], bool]:
    """Return the values given on the command line or in the YAML files of --config, and whether
    --debug was given. The command line overrides the files, and later files override earlier ones.
    """
    parser = build_parser(config_class, doc)
    names = [f.name for f in fields(config_class)]
    argv = normalize_flags(sys.argv[1:] if argv is None else argv, config_class)
    namespace, unknown = parser.parse_known_args(argv)
    given = vars(namespace)
    files, debug = given.pop("config"), given.pop("debug")
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        parser.error(f"unknown flag {unknown[0]}{suggest(name, names, '--')}")
    try:
        sources = [(f"{file}: ", read_yaml(Path(file))) for file in files]
    except (OSError, ValueError) as error:
        parser.error(str(describe_error(error)))
    values: dict[str, Any] = {}
    for source, content in [*sources, ("", given)]:
        for name, value in content.items():
            if name not in names:
                suggestion = suggest(str(name), names)
                parser.error(f"{source}{name} is not a setting of this command{suggestion}")
            try:
                values[name] = convert_setting(value, config_class, name)
            except ValueError as error:
                parser.error(f"{source}{error}")
    return values, debug


def normalize_flags(argv: Sequence[str], config_class: type) -> list[str]:
    """Write --max-steps as --max_steps, and --compile true or --compile=true as --compile."""
    names = {f.name.replace("_", "-"): f.name for f in fields(config_class)}
    switches = {f.name for f in fields(config_class) if base_type(f.type) is bool}
    normalized, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            no = "no-" if name.startswith("no-") else ""
            name = name.removeprefix("no-")
            name = names.get(name, name)
            argument = f"--{no}{name}{equals}{value}"
            if name in switches and not no:
                if not equals and rest and rest[0].lower() in ("true", "false"):
                    value = rest.pop(0)
                argument = {"true": f"--{name}", "false": f"--no-{name}"}.get(
                    value.lower(), argument
                )
        normalized.append(argument)
    return normalized


def suggest(name: str, names: list[str], prefix: str = "") -> str:
    near = get_close_matches(name.replace("-", "_"), names, n=1)
    return f", did you mean {prefix}{near[0]}?" if near else ""


def build_parser(config_class: type[Config], doc: str) -> Parser:
    parser = Parser(doc, usage="%(prog)s [flags]")
    config_help = "YAML file with settings, NAME: VALUE; flags override it"
    parser.add_argument("--config", action="append", metavar="FILE", default=[], help=config_help)
    group: Any = parser
    for f in fields(config_class):
        metadata = find_metadata(config_class, f.name)
        if metadata["group"]:
            group = parser.add_argument_group(metadata["group"])
        add_flag(group, f, metadata["help"])
    return parser


def add_flag(group: Any, f: Field, help_text: str) -> None:
    kind = base_type(f.type)
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    if default not in (None, "", []) and "(default" not in help_text:
        shown = " ".join(default) if isinstance(default, list) else json.dumps(default).strip('"')
        help_text += f" (default: {shown})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is list or kind is Names:
        options |= {"nargs": "+", "action": "extend", "metavar": "TEXT"}  # may be repeated
    elif typing.get_origin(kind) is Literal:
        options["metavar"] = "{" + ",".join(typing.get_args(kind)) + "}"
    else:
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    group.add_argument(f"--{f.name}", **options)


def find_metadata(config_class: type, name: str) -> typing.Mapping[str, Any]:
    """Return the metadata of a flag. A field that only overrides a default inherits it."""
    for cls in config_class.__mro__:
        f = vars(cls).get("__dataclass_fields__", {}).get(name)
        if f is not None and f.metadata.get("help"):
            return f.metadata
    raise KeyError(f"{config_class.__name__}.{name} has no help; declare it as flag(default, help)")


def base_type(kind: Any) -> Any:
    """Return the type without `| None`."""
    inner = [t for t in typing.get_args(kind) if t is not type(None)]
    return inner[0] if type(None) in typing.get_args(kind) else kind


def convert_setting(value: Any, config_class: type, name: str) -> Any:
    """Convert a command-line string or a YAML value to the type of the field `name`."""
    f = next(f for f in fields(config_class) if f.name == name)
    kind = base_type(f.type)
    is_optional = f.default is None or kind is not f.type
    if is_optional and value in (None, "null"):
        return None
    if name not in ("prompt", "instruction", "input"):  # free text, not paths
        value = expand_home(value)
    try:
        return convert_value(value, kind)
    except (ValueError, OverflowError) as error:
        shown = {"None": "null", "True": "true", "False": "false"}.get(repr(value), value)
        expected = describe_type(kind) + (" or null" if is_optional else "")
        raise ValueError(f"{name} is {shown or repr(shown)}, expected {expected}") from error


def expand_home(value: Any) -> Any:
    """Expand ~/ in a path or a list of paths, as a shell does if the path is not quoted."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return str(Path(value).expanduser()) if str(value).startswith("~/") else value


def convert_value(value: Any, kind: Any) -> Any:
    """Convert `value` to `kind`. Raises ValueError or OverflowError if it cannot be converted."""
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind in (int, float) and is_number:
        return convert_number(value, kind)
    if kind in (str, Names) and isinstance(value, str):
        return value
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    takes_list = kind is Names or typing.get_origin(kind) is list
    if takes_list and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(item.strip(",") for item in value) if kind is Names else value
    raise ValueError(f"{value!r} is not {describe_type(kind)}")


def convert_number(value: str | float, kind: Any) -> Any:
    if kind is int and not isinstance(value, float):
        with suppress(ValueError):
            return int(value)  # exact, however large
    number = float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):  # 1e3 is an int
        raise ValueError(f"{value!r} is not {describe_type(kind)}")
    return kind(number)


def describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))
    return "a list of strings" if typing.get_origin(kind) is list else TYPE_NAMES[kind]


class SettingsLoader(yaml.SafeLoader):
    """Loads YAML, but rejects repeated keys, and parses only JSON numbers. Other numbers stay text
    for `convert_setting`, so 010 is 10, as on the command line, and not an octal 8.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{name} is on lines {lines[name]} and {line}; delete one")
            lines[name] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        try:
            return json.loads(node.value)
        except ValueError:
            return node.value

    yaml_constructors: ClassVar[dict] = yaml.SafeLoader.yaml_constructors | dict.fromkeys(
        [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")], construct_number
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a file of settings. Raises ValueError if it holds anything else."""
    try:
        content = SettingsLoader(file.read_text(encoding="utf-8")).get_single_data()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r:.60}, expected lines NAME: VALUE")
    return content


def to_yaml(config: "DataclassInstance") -> str:
    """Return the config as YAML that `--config` can read."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def fixed_settings(config_class: type) -> set[str]:
    """Return the settings that must not change on resume: the loss curve depends on them."""
    names = {f.name for f in fields(config_class)}
    return {name for name in names if not find_metadata(config_class, name)["may_change"]}

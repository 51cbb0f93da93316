"""A file of its own because all commands share it: how flags are read, and how an error is told."""

import io
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
BAD_INPUT = 2  # the exit code of argparse for bad usage
INTERRUPTED = 130  # what a shell reports after Ctrl-C: 128 + SIGINT
READER_GONE = 141  # and after the end of a pipe: 128 + SIGPIPE
REMEDIES = {
    FileNotFoundError: "check that it is there",
    FileExistsError: "expected a folder",
    NotADirectoryError: "expected a folder",
    IsADirectoryError: "expected a file",
    PermissionError: "check who may use it",
}
IN_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


def run(main: Callable[[Config], None], config_class: type[Config], description: str) -> None:
    """Call `main` with the dataclass `config_class`, made from the command line: every field is a
    flag whose help is the string under it, and a key of the YAML file behind `--config`.

    What a user can mend (an unknown flag or key, a ValueError, an OSError) ends in one line and
    exit code 2.
    """
    # Not every terminal has all of a sample's characters.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file of any of these, by name")
    parser.expected = {field.name: in_words(field.type) for field in fields(config_class)}
    # A list takes its values as a shell gives them: --dataset a.txt b.txt
    lists = {
        f.name: {"default": f.default_factory(), "help": f.metadata["help"]}
        for f in fields(config_class)
        if f.default_factory is not MISSING
    }
    parser.add_class_arguments(config_class, None, skip=set(lists), as_group=False)
    for name, settings in lists.items():
        parser.add_argument(f"--{name}", nargs="+", **settings)
    values = vars(parser.parse_args())
    config = {field.name: values[field.name] for field in fields(config_class)}
    for field in fields(config_class):  # jsonargparse lets null pass for everything
        value = config[field.name]
        if value is None and NoneType not in typing.get_args(field.type):
            parser.error(f"{field.name} is null, expected a value; leave it out for the default")
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{field.name} is {value}, expected a finite number")
    tell_errors(lambda: main(config_class(**config)), debug=values["debug"])


def tell_errors(call: Callable[[], None], debug: bool = False) -> None:
    """Call; a ValueError, an OSError or too little memory ends in one line and exit code 2, Ctrl-C
    in a word.
    """
    try:
        call()
    except BrokenPipeError:  # the reader, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_GONE)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        told = _told(error)
        if debug or told is None:
            raise
        print(f"error: {' '.join(told.split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _told(error: Exception) -> str | None:
    """What to say of an error; one of the system's gets its file and a remedy. None for a fault of
    the program.
    """
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(type(error), "check that it may be used and has room")
        return f"{error.filename or 'the output'}: {error.strerror}; {remedy}"
    if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory", str(error)):
        return None
    if isinstance(error, (MemoryError, RuntimeError)):  # PyTorch's is the latter
        return f"too little memory: {error}; choose a smaller model or fewer rows at once"
    return str(error)


class Parser(ArgumentParser):
    expected: typing.Mapping[str, str] = MappingProxyType({})  # of each setting, in words
    where = ""  # the file that is being read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str, *_: object) -> NoReturn:
        # jsonargparse tells of a wrong type in five lines of Python's words.
        wrong = re.fullmatch(r'(?s)Parser key "(\w+)":.*(?:Got|Given) value: (.*)', message)
        if wrong and wrong[1] in self.expected:
            message = f"{wrong[1]} is {wrong[2]}, expected {self.expected[wrong[1]]}"
        told = " ".join(message.split())
        print(f"error: {self.where}{told} (-h lists the flags)", file=sys.stderr)
        sys.exit(BAD_INPUT)


class ConfigFile(ActionConfigFile):
    """The file behind --config, whose errors begin with its name."""

    def __call__(self, parser: Any, config: Any, file: Any, option: str | None = None) -> None:
        parser.where = f"{file}: "
        if not Path(file).is_file():
            parser.error("no such file, expected one of YAML after --config")
        try:
            with Path(file).open(encoding="utf-8") as stream:
                content = yaml.safe_load(stream)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"no YAML: {error}")
        if not isinstance(content, dict):
            parser.error(f"holds {content!r:.60}, expected lines of NAME: VALUE")
        for name in content.keys() - parser.expected.keys():
            parser.error(f"{name} is none of the settings")
        super().__call__(parser, config, file, option)
        parser.where = ""


def in_words(kind: object) -> str:
    """What a setting of this type may be."""
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(typing.get_args(kind))
    if typing.get_origin(kind) in (UnionType, typing.Union):
        return " or ".join(map(in_words, typing.get_args(kind)))
    return IN_WORDS.get(kind, "a text")


def as_yaml(config: "DataclassInstance") -> str:
    """A config as the YAML that `--config` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)

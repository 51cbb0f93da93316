"""A file of its own because all commands share it: how flags are read, and how an error is told."""

import io
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
BAD_INPUT = 2  # the exit code of argparse for bad usage
INTERRUPTED = 130  # what a shell reports after Ctrl-C: 128 + SIGINT
READER_GONE = 141  # and after the end of a pipe: 128 + SIGPIPE


def run(main: Callable[[Config], None], config_class: type[Config], description: str) -> None:
    """Call `main` with the dataclass `config_class`, made from the command line: every field is a
    flag whose help is the string under it, and a key of the YAML file behind `--config`.

    What a user can mend (an unknown flag or key, a ValueError, an OSError) ends in one line and
    exit code 2.
    """
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # not every terminal has all of a sample's characters
        sys.stdout.reconfigure(errors="replace")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of any of these, by name")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # A list takes its values as a shell gives them: --dataset a.txt b.txt
    lists = {
        f.name: {"default": f.default_factory(), "help": f.metadata["help"]}
        for f in fields(config_class)
        if f.default_factory is not MISSING
    }
    parser.add_class_arguments(config_class, None, skip=set(lists), as_group=False)
    for name, settings in lists.items():
        parser.add_argument(f"--{name}", nargs="+", **settings)
    try:
        values = vars(parser.parse_args())
    except UnicodeDecodeError as error:
        parser.error(f"--config is no YAML, which is text in UTF-8: {error}")
    for field in fields(config_class):  # jsonargparse lets null pass for everything
        if values[field.name] is None and type(None) not in typing.get_args(field.type):
            parser.error(f"{field.name} is null, expected a value; leave it out for the default")
    config = {field.name: values[field.name] for field in fields(config_class)}
    tell_errors(lambda: main(config_class(**config)), debug=values["debug"])


def tell_errors(call: Callable[[], None], debug: bool = False) -> None:
    """Call; a ValueError or OSError ends in its message and exit code 2, Ctrl-C in a word."""
    try:
        call()
    except BrokenPipeError:  # the reader, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_GONE)
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {_told(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _told(error: Exception) -> str:
    """The message of an error; one of the system's gets its file and a remedy."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or "the output"
        return f"{where}: {error.strerror}; check that it is there, may be used, and has room"
    return str(error)


class Parser(ArgumentParser):
    def error(self, message: str, *_: object) -> NoReturn:
        told = " ".join(message.split()).replace('"<unicode string>"', "the --config file")
        print(f"error: {told} (-h lists the flags)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def as_yaml(config: "DataclassInstance") -> str:
    """A config as the YAML that `--config` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)

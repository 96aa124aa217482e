"""From a frozen dataclass to a command line, and the one error type a user sees.

Concept   each command of this repository is one frozen dataclass: a field is a flag, its metadata the help text, its
          default the default. Nothing is parsed anywhere else, so `--help` is the documentation.
Paper     none: plumbing.
"""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """argparse, whose complaint about a wrong flag is one line, as every other mistake's."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.prog} --help says what there is\n")


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line that says what, what was expected, what to do."""


def flag(default=dataclasses.MISSING, *, help: str):
    """A dataclass field that becomes the command-line flag of its name; without a default it is required."""
    return dataclasses.field(default=default, metadata={"help": help})


def words(default: tuple[str, ...] = (), *, help: str):
    """A dataclass field that takes the words of the command line that belong to no flag, as a tuple of str."""
    return dataclasses.field(default=default, metadata={"help": help, "words": True})


def from_cli(cls, argv: Sequence[str] | None = None):
    """Build the dataclass `cls` from the command line: one --flag per field, underscores written as dashes.

    A field made by `words` takes what stands without a flag. Types of the others are str, int, float, pathlib.Path,
    bool (--flag / --no-flag), and `T | None` of those, where the word `none` means None. Wrong flags print one line
    and exit with status 2.
    """
    parser = Parser(description=cls.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING
        help_text = f.metadata["help"].replace("%", "%%")
        if not required and f.default is not None:
            help_text += f" (default: {f.default})"
        if "words" in f.metadata:
            parser.add_argument(f.name, nargs="*", default=f.default, metavar=f.name.upper(), help=f.metadata["help"])
            continue
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            base, optional = _base_type(f.type)
            kind = {"type": _or_none(base) if optional else base, "metavar": f.name.upper()}
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            required=required,
            default=None if required else f.default,
            help=help_text,
            **kind,
        )
    told = vars(parser.parse_intermixed_args(argv))
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})


def _base_type(kind) -> tuple[type, bool]:
    """`T | None` -> (T, True); `T` -> (T, False)."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (base,) = [k for k in typing.get_args(kind) if k is not type(None)]
        return base, True
    return kind, False


def _or_none(base: type) -> Callable:
    def parse(text: str):
        return None if text.lower() == "none" else base(text)

    parse.__name__ = base.__name__  # argparse's "invalid int value" names it
    return parse


def check_frames(frames: int) -> None:
    """UserError unless --frames is 1 + 6k: the video VAE packs one frame alone, then six at a time."""
    if frames < 1 or (frames - 1) % 6:
        below = max(1, frames - (frames - 1) % 6)
        raise UserError(f"--frames {frames}: the video VAE packs 1 + 6k frames; use {below} or {below + 6}")


def make_folder(folder: Path, flag: str) -> None:
    """Make the folder that `flag` names, before work is done whose result it will hold; UserError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: is no folder and cannot be made one: {error.strerror}; give another by {flag}"
        ) from error


def run(main: Callable[[], None]) -> None:
    """Call `main()`; a UserError becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

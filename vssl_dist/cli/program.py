"""`vssl` itself, and the door through which the scripts of launch/ and data_prep/ go to it."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path

import click

import vssl_dist
from vssl_dist.cli.commands import COMMANDS
from vssl_dist.cli.places import code_folder, module_name
from vssl_dist.cli.words import REFUSED, Call, read
from vssl_dist.text import printable, say

_ABOUT = """Self-supervised image pretraining on a SLURM cluster or on this machine.

`vssl COMMAND --help` says what a command takes.  Configs and profiles are files, or the names of
shipped ones: vssl submit --local quickstart
"""


class _Program(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order in which they are used."""
        return list(self.commands)


def _program() -> click.Group:
    return _Program(
        "vssl",
        commands={**COMMANDS},
        help=_ABOUT,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        params=[
            click.Option(
                ["--version"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_version,
                help="Show the version and exit.",
            )
        ],
        no_args_is_help=True,
        callback=None,
    )


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        say(f"vssl {vssl_dist.__version__}")
        ctx.exit()


def vssl() -> int:
    """Run the command line of this process; returns the exit code."""
    program = _program()
    if "_VSSL_COMPLETE" in os.environ:
        program.main(prog_name="vssl")  # a shell asks what may stand here
    return _carried_out(read(program, sys.argv[1:], "vssl"))


def script(name: str, words: Sequence[str], program: str) -> int:
    """Run the script of a command, such as ``launch/submit.py``; returns the exit code.

    Args:
        name: Name of the command.
        words: Words that the user typed after the script.
        program: Name of the script, for messages.
    """
    # Workers of a pool import the module that was started, which is a file of a package here.
    sys.modules["__main__"].__spec__ = ModuleSpec("vssl_dist.cli.__main__", None)
    return _carried_out(read(COMMANDS[name], words, program))


def arguments(name: str, words: Sequence[str]) -> Namespace:
    """Read the words of a command.

    Raises:
        SystemExit: With 2 after usage and one line, or 0 after help.
    """
    call = read(COMMANDS[name], words, name)
    if isinstance(call, int):
        raise SystemExit(call)
    return call.args


def _carried_out(call: Call | int) -> int:
    if isinstance(call, int):
        return call
    try:
        call.command.look(call.args)
    except ValueError as error:  # a ConfigError is one
        say(f"error: {error}", to_stderr=True)
        return REFUSED
    if str(code_folder()) not in sys.path:
        sys.path.append(str(code_folder()))
    warnings.formatwarning = _one_line
    module = import_module(module_name(call.command.module))
    code: int = module.main(call.words)
    return code


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning of this project, for people; others say where they come from."""
    if str(Path(vssl_dist.__file__).parent) in filename:
        return f"warning: {printable(str(message))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"

"""Reading of a command's words: click, with errors of one harmless line."""

from __future__ import annotations

import argparse
import ast
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from vssl_dist.cli.places import by_name, module_file, names
from vssl_dist.text import say

REFUSED = 2
_OLD_NAMES = re.compile(r"python (?:launch|data_prep)/(\w+)\.py|`?launch/(\w+)\.py")
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class PathWord(click.ParamType[Path]):
    """The path of a file or folder, in which ``~`` and ``$VAR`` are expanded."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Expand the path, or complain as click does."""
        from vssl_dist.config.paths import path_argument

        try:
            return path_argument(str(value))
        except argparse.ArgumentTypeError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Leave files and folders to the shell itself."""
        return [CompletionItem(incomplete, type="file")]


class FileWord(PathWord):
    """The path of a YAML file, or the bare name of a shipped one."""

    def __init__(self, folder_name: str) -> None:
        self._folder_name = folder_name

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Find the file's path; what was typed where there is no such file."""
        return by_name(self._folder_name, super().convert(value, param, ctx))

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Complete the names of shipped files, and files."""
        shipped = [n for n in names(self._folder_name) if n.startswith(incomplete)]
        return [CompletionItem(name) for name in shipped] + super().shell_complete(
            ctx, param, incomplete
        )


@dataclass(frozen=True)
class Call:
    """A command and its words, which have been checked."""

    command: Command
    words: list[str]
    """The words after the command, as the user typed them."""
    args: Namespace


class Command(click.Command):
    """One command of `vssl`, and the script of the same name.

    Args:
        name: After ``vssl``.
        module: Whose ``main`` carries it out; its docstring is the help.
        summary: One line of the list of commands.
        params: Options and arguments of the command.
        wrong: Says what is wrong with its options, or None.
        look: Refuses what can be seen to be wrong without heavy imports, by an exception.
        prefixes: Whether the beginning of an option's name stands for it, as it always did.
        number: An option that may stand without its number, which is 0 then.
    """

    def __init__(
        self,
        name: str,
        module: str,
        summary: str,
        params: Sequence[click.Parameter],
        **more: Any,
    ) -> None:
        super().__init__(
            name, context_settings=dict(_HELP), params=list(params), short_help=summary
        )
        self.module = module
        self.wrong: Callable[[Namespace], str | None] = more.get("wrong", lambda args: None)
        self.look: Callable[[Namespace], None] = more.get("look", lambda args: None)
        self._prefixes: bool = more.get("prefixes", False)
        self._number: str | None = more.get("number")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words, which stay as they were typed in ``ctx.obj``."""
        ctx.obj = list(args)
        remaining = super().parse_args(ctx, self._with_number(self._complete_options(args)))
        if not ctx.resilient_parsing and (complaint := self.wrong(Namespace(**ctx.params))):
            ctx.fail(complaint)
        return remaining

    def invoke(self, ctx: click.Context) -> Call:
        """Return the call without running it."""
        # A parser's treatment of Ctrl-C is not a command's.
        return Call(self, ctx.obj, Namespace(**ctx.params))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the module's docstring, line by line."""
        text = ast.get_docstring(ast.parse(module_file(self.module).read_text())) or ""
        if ctx.parent is not None:
            text = _OLD_NAMES.sub(lambda m: f"vssl {(m[1] or m[2]).replace('_', '-')}", text)
        formatter.write(f"\n{text}\n")

    def _with_number(self, args: list[str]) -> list[str]:
        """Turn ``--local CONFIG`` into ``--local=0 CONFIG``: click would take the file for N."""
        following = [*args[1:], ""]
        return [
            f"{word}=0" if word == self._number and not after.isdigit() else word
            for word, after in zip(args, following, strict=False)
        ]

    def _complete_options(self, args: list[str]) -> list[str]:
        if not self._prefixes:
            return args
        options = [name for p in self.params if isinstance(p, click.Option) for name in p.opts]
        options.append("--help")
        completed = []
        for word in args:
            name, equals, value = word.partition("=")
            matches = [option for option in options if option.startswith(name)]
            is_prefix = name.startswith("--") and name != "--" and name not in options
            unique = is_prefix and len(matches) == 1
            completed.append(f"{matches[0]}{equals}{value}" if unique else word)
        return completed


def read(command: click.Command, words: Sequence[str], program: str) -> Call | int:
    """Read a command line; an exit code where help was all that was asked for.

    Raises:
        SystemExit: With 2, after usage and one line.
    """
    try:
        result = command.main(list(words), prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        say(*error.format_message().splitlines(), to_stderr=True)
        raise SystemExit(REFUSED) from None
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            say(*error.ctx.get_usage().splitlines(), to_stderr=True)
        say(f"{program}: error: {error.format_message()}", to_stderr=True)
        raise SystemExit(REFUSED) from None
    assert isinstance(result, Call | int)
    return result

"""`optimum-cli export himap --model MODEL OUTPUT`: himap-export behind the door that users of optimum know.

The options are himap-export's own, copied from its parser, and every word goes on to its `main` as it was typed: what
an option means is said in one place. optimum finds this class through `optimum_register/`.
"""

from argparse import ArgumentParser, Namespace, _AppendAction
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from himap_export.exporter.cli import _parser, main

# optimum brings its --help; its exporters take --model MODEL and a positional output.
OWN = ("help", "version", "print_completion", "model", "out")


class HimapExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
    """One subcommand of `optimum-cli export`."""

    COMMAND = CommandInfo(name="himap", help="Export a multimodal LLM as staged, visually pruned engines.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Gives optimum's parser `--model`, the output, and every other option of himap-export."""
        source = _parser()
        actions = {action.dest: action for action in source._actions}
        parser.add_argument("--model", required=True, metavar="MODEL", help=actions["model"].help)
        where = f"{actions['out'].help}; not directly behind --text-budget N"  # which would take it for one more N
        parser.add_argument("out", nargs="?", metavar="OUTPUT", help=where)
        for name, action in actions.items():
            if name in OWN:
                source._remove_action(action)
            elif callable(action.type):
                action.type = _as_typed(action.type)
        parser._add_container_actions(source)  # as ArgumentParser(parents=[source]) does

    def run(self) -> None:
        """Runs himap-export, to its exit code."""
        if self.args.out is None and not self.args.dry_run:
            self.parser.error("OUTPUT is needed (or --dry-run)")
        main(list(_words(self.args)))


def _as_typed(convert: Callable[[str], object]) -> Callable[[str], str]:
    """Returns an option's type that refuses what `convert` refuses, and leaves the word as it is."""

    @wraps(convert, updated=())  # its name is in argparse's messages
    def check(word: str) -> str:
        convert(word)
        return word

    return check


def _words(args: Namespace) -> Iterator[str]:
    """Yields the words of himap-export's command line that say the same."""
    yield args.model
    if args.out is not None:
        yield from ("--out", args.out)
    for action in _parser()._actions:
        value: Any = getattr(args, action.dest, None)
        if action.dest in OWN or value == action.default:
            continue
        for once in value if isinstance(action, _AppendAction) else [value]:
            yield action.option_strings[-1]
            if action.nargs != 0:  # not a mere flag
                yield from once if isinstance(once, list) else [once]

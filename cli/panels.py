"""Options of a command in groups, so that its help can be read."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, get_type_hints

Command = TypeVar("Command", bound=Callable[..., object])


def in_panels(panels: Mapping[str, Sequence[str]]) -> Callable[[Command], Command]:
    """Return a decorator that shows options of a typer command under headings.

    Args:
        panels: The parameters under each heading; the others stay under the usual one.

    Raises:
        KeyError: The command has no parameter of such a name.
    """

    def arranged(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        for heading, names in panels.items():
            for name in names:
                hints[name].__metadata__[0].rich_help_panel = heading
        return command

    return arranged

"""The command ``ckpt completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.completing import use_whole_words_in_bash
from ckptkit.cli.common.printing import print_line

__all__ = ["completion"]


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes ckpt in a shell.

    The shell then completes commands, options, presets, optimizers, and the keys of the file on the line:
    ckpt remap model.safetensors --keep <TAB>.

    \b
    echo 'eval "$(ckpt completion bash)"' >> ~/.bashrc
    echo 'autoload -Uz compinit && compinit && eval "$(ckpt completion zsh)"' >> ~/.zshrc
    mkdir -p ~/.config/fish/completions
    ckpt completion fish > ~/.config/fish/completions/ckpt.fish
    """  # noqa: D301 - \b is click's mark
    use_whole_words_in_bash()
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has a class for each of the three
    program = context.find_root()
    print_line(kind(program.command, {}, "ckpt", "_CKPT_COMPLETE").source())

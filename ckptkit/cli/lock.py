"""``$ ckpt groups lock``."""

from __future__ import annotations

import click

from ckptkit.cli.group_options import Source, source_options
from ckptkit.cli.model import live_model, model_option
from ckptkit.cli.options import Form, about, echo_report, form_options, quiet_option
from ckptkit.cli.outputs import write_json
from ckptkit.cli.streams import tell
from ckptkit.core.text import plural, printable
from ckptkit.param_groups.lock import lock_document, lock_param_groups
from ckptkit.render.lock import lock_page

__all__ = ["lock"]


@click.command()
@model_option
@source_options
@click.option("-o", "--output", type=click.Path(), metavar="LOCK", required=True, help="Where the lock is written.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@form_options
@quiet_option
def lock(source: Source, *, model: str, output: str, force: bool, form: Form, quiet: bool) -> None:
    """Write down what trains with what: names, shapes, places in the optimizer's state, ties and options.

    A lock is a JSON file to keep beside a run; ckpt groups diff holds a model, a spec or another lock against it.

    \b
    ckpt groups lock --model py:mynet:build groups.toml -o groups.lock.json
    """  # noqa: D301 - \b is click's mark
    live = live_model(model)
    spec = source.over(live, quiet=quiet)
    with about(source.path):
        locked = lock_param_groups(live, spec)
    write_json(output, lock_document(locked), force=force)
    if form is not Form.TEXT:
        echo_report(form, lambda: lock_page(locked), lambda: lock_document(locked))
    if not quiet:
        count = sum(len(group.parameters) for group in locked.groups)
        tell(f"wrote {printable(output)}: {plural(count, 'parameter')} in {plural(len(locked.groups), 'group')}")

"""The command line. Each verb imports what it needs inside its function, so that `--help` and `status` stay fast."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from pdctl import __version__, console
from pdctl.commands.ask import ask
from pdctl.commands.bench import app as bench
from pdctl.commands.control.apply import apply, scale
from pdctl.commands.control.down import down
from pdctl.commands.control.process import drain, restart, start, stop
from pdctl.commands.control.role import role
from pdctl.commands.control.up import up
from pdctl.commands.doctor import doctor
from pdctl.commands.inspect.dash import dash
from pdctl.commands.inspect.events import events
from pdctl.commands.inspect.kv import kv
from pdctl.commands.inspect.logs import logs
from pdctl.commands.inspect.metrics import app as metrics
from pdctl.commands.inspect.status import status
from pdctl.commands.inspect.top import top
from pdctl.commands.inspect.why import why
from pdctl.commands.predict.recommend import recommend
from pdctl.commands.predict.simulate import simulate
from pdctl.commands.setup.init import init
from pdctl.commands.setup.key import key
from pdctl.commands.setup.plan import plan
from pdctl.errors import ConfigError, PdctlError, Verdict
from pdctl.host.users import make_variables_absolute

app = typer.Typer(
    name="pdctl",
    help="Run prefill/decode-disaggregated LLM serving with one command.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (
    init, plan, up, status, top, dash, logs, events, why, restart, stop, start, drain, role, scale, apply, kv, ask,
    doctor, key, down, simulate, recommend,
):  # fmt: skip
    app.command()(verb)
app.add_typer(bench, name="bench")
app.add_typer(metrics, name="metrics")


# Errors of writing to a stdout that is full, closed or gone.
_FULL = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)


def _version(wanted: bool) -> None:
    if wanted:
        console.out(f"pdctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Run prefill/decode-disaggregated LLM serving with one command."""


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 an error that the user can fix, 2 an unexpected error."""
    console.prepare()
    make_variables_absolute()
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of stdout has exited (`| head`): nothing more can be printed.
        console.drop_stdout()
        sys.exit(0)
    except OSError as failure:
        if failure.errno not in _FULL or failure.filename is not None:
            _unexpected(failure)
        told = console.cannot_print(failure)
        console.error(told.message, told.hint)
        sys.exit(told.exit_code)
    except Exception as failure:  # noqa: BLE001 - this is the outermost loop
        _unexpected(failure)


def _run() -> int:
    """Run one command and return its exit code. Errors that the user can fix are printed."""
    try:
        # Not click's standalone mode: it prints messages of lower libraries unchanged and exits with 2.
        return int(app(standalone_mode=False) or 0)
    except TyperException as failure:
        _usage_error(failure)
        return 1
    except ConfigError as failure:
        _config_error(failure)
        return failure.exit_code
    except PdctlError as failure:
        console.error(failure.message, failure.hint)
        return failure.exit_code
    except Verdict as verdict:
        return verdict.code


def _usage_error(failure: TyperException) -> None:
    """Print click's message and its usage line, without the prefixes of lower libraries."""
    if isinstance(message := getattr(failure, "message", None), str):
        failure.message = message.replace("Value error, ", "")
    failure.show()  # type: ignore[attr-defined]


def _unexpected(failure: Exception) -> NoReturn:
    if os.environ.get("PDCTL_DEBUG"):
        raise failure
    console.error(
        f"unexpected: {type(failure).__name__}: {failure}",
        "run again with PDCTL_DEBUG=1 for the traceback",
    )
    sys.exit(2)


def _config_error(failure: ConfigError) -> None:
    for problem in failure.problems:
        where = f"{failure.source}:{problem.line}" if problem.line else failure.source
        key = f"{problem.key}: " if problem.key else ""
        console.error(f"{where}: {key}{problem.message}", problem.hint)
    console.note(failure.message)

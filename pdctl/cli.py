"""The command line. A verb is imported when it is used, and imports what it needs inside its function: `--help` and
`status` stay fast."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from pdctl import __version__, console
from pdctl.commands.verbs import Verbs
from pdctl.errors import ConfigError, PdctlError, Verdict

app = typer.Typer(
    name="pdctl",
    cls=Verbs,
    help="Run prefill/decode-disaggregated LLM serving with one command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Set by the completion scripts: the words are incomplete, and what may follow is wanted.
COMPLETION_ENV = "PDCTL_COMPLETION"
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
    from pdctl.host.users import make_variables_absolute

    make_variables_absolute()


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 an error that the user can fix, 2 an unexpected error."""
    console.prepare()
    if COMPLETION_ENV in os.environ:
        from pdctl.commands.shell.completion import answer

        answer(app)
        return
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
    except SystemExit as ended:
        # click ends the program with 1 when the reader of stdout has exited, in each of its modes.
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None
        raise
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

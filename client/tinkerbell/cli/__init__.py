"""The `tinkerbell` command."""

import sys


def main() -> None:
    """Runs the command, or says what it lacks."""
    try:
        from tinkerbell.cli.commands import app  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"grpc_health", "rich", "typer"}:
            raise
        sys.exit(f"the tinkerbell command needs {error.name}: pip install 'tinkerbell[cli]'")
    app()

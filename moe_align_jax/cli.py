"""The `moe-align` command: its entry point. typer and rich come with the extra `cli`."""

import sys


def main() -> None:
    """Runs `moe-align`; without typer and rich, names the extra that brings them (exit code 1).

    Ctrl-C ends it with exit code 130: typer sees to that while a command runs, this while jax is imported.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"moe-align: the command line needs {error.name}, which is not installed. "
            "Install the extra `cli`: pip install 'moe-align-jax[cli]' (in a checkout: "
            "pip install -e '.[cli]').",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    try:
        from moe_align_jax._cli.app import app
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    app()


if __name__ == "__main__":
    main()

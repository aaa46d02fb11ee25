"""The command line, as `gold` and as `python -m gold`."""


def main() -> None:
    """The `gold` command; Ctrl-C ends it without a traceback while it is being imported too."""
    try:
        from gold.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()

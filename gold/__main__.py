"""The command line as `python -m gold`."""

from gold.cli import main

if __name__ == "__main__":
    main()

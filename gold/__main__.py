"""`python -m gold` is the command line."""

from gold.cli import main

if __name__ == "__main__":
    main()

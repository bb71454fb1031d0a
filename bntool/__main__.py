"""`python -m bntool` is the command line."""

from bntool.cli import main

if __name__ == "__main__":
    main()

"""`python -m constellation` is the command line."""

from constellation.cli import main

if __name__ == "__main__":
    main()

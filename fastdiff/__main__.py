"""`python -m fastdiff` is the `fastdiff` command."""

from .cli import main

if __name__ == "__main__":
    main()

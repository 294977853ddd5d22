"""`python -m cli` is `sandbatch`."""

from cli.main import main

if __name__ == "__main__":
    main()

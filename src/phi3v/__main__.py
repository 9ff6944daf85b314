"""`python -m phi3v` and the `phi3v` command: both call the command line and nothing else."""

from phi3v.cli import main

if __name__ == "__main__":
    main()

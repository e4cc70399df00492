"""python -m fastllama: the command line."""

import sys

from fastllama.lab.cli.command import main

if __name__ == "__main__":
    sys.exit(main())

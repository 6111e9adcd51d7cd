"""`python -m flexinfer`: the command line."""

import sys

from flexinfer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

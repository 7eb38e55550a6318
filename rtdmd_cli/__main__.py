"""`python -m rtdmd_cli`: the same program as `rtdmd`."""

import sys

from rtdmd_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m deployments.cli`, where the script `trunkline` is not on the PATH."""

import sys

from deployments.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

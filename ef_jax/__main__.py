"""`python -m ef_jax`: the command `ef-jax`."""

import sys

from ef_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())

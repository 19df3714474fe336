"""`python -m blip_jax` is `blip-jax`."""

import sys

from blip_jax.cli.main import main

sys.exit(main())

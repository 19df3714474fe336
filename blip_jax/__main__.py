"""`python -m blip_jax` is `blip-jax`."""
import sys

from blip_jax.cli import main

sys.exit(main())

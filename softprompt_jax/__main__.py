"""`python -m softprompt_jax` is `softprompt`."""

from softprompt_jax.cli.main import main

main()

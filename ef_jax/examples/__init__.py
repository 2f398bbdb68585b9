"""Programs to read and to change: `python -m ef_jax.examples.fine_tune`."""

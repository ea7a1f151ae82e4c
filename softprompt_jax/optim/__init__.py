"""What changes trainable parameters: optimizers and schedules, losses, and search without gradients.

`optimizers` builds an optax optimizer from settings, `losses` is the cross entropy, `gradient_free` holds CMA-ES and
the search over words, which need scores only.
Begin with `optimizers.py`."""

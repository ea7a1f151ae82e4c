"""Cross entropy as T5 trains with it: a sum over real target tokens, z-loss, label smoothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B U V"],
    targets: Int[Array, "B U"],
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    padding: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the summed loss in nats and the number of real target tokens (those above `padding`).

    `z_loss` times log(Z)^2 keeps the logits near normalised. With label smoothing the entropy of the
    smoothed target is subtracted, so that a perfect prediction costs 0.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    loss = log_z - picked
    if label_smoothing:
        low = label_smoothing / (logits.shape[-1] - 1)
        high = 1.0 - label_smoothing
        others = jnp.sum(logits, -1) - picked
        loss = log_z * (high + low * (logits.shape[-1] - 1)) - high * picked - low * others
        loss = loss + high * jnp.log(high) + (logits.shape[-1] - 1) * low * jnp.log(low)
    loss = loss + z_loss * log_z**2
    real = (targets > padding).astype(jnp.float32)
    return jnp.sum(loss * real), jnp.sum(real)


def divergence(
    logits: Float[Array, "B U V"],
    teacher: Float[Array, "B U V"],
    targets: Int[Array, "B U"],
    padding: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the summed KL divergence in nats from the teacher's distribution to that of `logits`.

    Both are summed over the real target tokens (those above `padding`), whose number is returned too. Source: Hinton et
    al., 2015; at a temperature of 1.
    """
    known = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
    each = jnp.sum(jnp.exp(known) * (known - jax.nn.log_softmax(logits)), -1)
    real = (targets > padding).astype(jnp.float32)
    return jnp.sum(each * real), jnp.sum(real)


def finite_mean(losses: Float[Array, " N"]) -> Float[Array, ""]:
    """Return the mean of the finite losses, NaN if there is none; a search may try candidates whose loss overflows."""
    return jnp.nanmean(jnp.where(jnp.isfinite(losses), losses, jnp.nan))

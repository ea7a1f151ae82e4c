"""How many activations a step keeps: what is predicted, what the compiler allocates, and what is chosen."""

from __future__ import annotations

import functools

import jax
import optax
import pytest
import tiny

from softprompt_jax.distributed import mesh
from softprompt_jax.methods import split
from softprompt_jax.models.layers import FeedForward
from softprompt_jax.run import Run
from softprompt_jax.training import remat
from softprompt_jax.training.step import first_state, make_step

TASK = {"name": "none", "source": {"kind": "files", "train": "none.jsonl"}}
GIB = 2**30


def lowered(memory: int | None = None, policy: str = "auto", unroll: bool = False, **changes):
    """Return the lowered step of a model whose activations outweigh its weights."""
    batch = tiny.batch(rows=8, length=60, targets=12, prompt=4)
    sizes = {"d_model": 64, "d_ff": 160, "d_kv": 16, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}
    parts = split(tiny.model(prompt=4, **sizes, unroll=unroll, remat="none" if policy == "auto" else policy))
    settings, optimizer = Run(task=TASK, remat=policy, **changes), optax.sgd(1.0)
    step = make_step(settings, parts, optimizer, memory=memory)
    state = jax.eval_shape(functools.partial(first_state, optimizer), parts.trainable)
    return step.lower(state, parts.frozen, batch, jax.random.key(0))


def chosen(monkeypatch, memory: int, **changes) -> tuple[str, dict[str, int]]:
    """Return the policy that a step takes on a device of so many bytes, and what each would keep."""
    found: dict[str, int] = {}

    def spy(kept, room):
        found.update({policy: kept(policy) for policy in ("none", "dots", "full")})
        found["room"] = room
        return choose(kept, room)

    choose = remat.choose
    monkeypatch.setattr(remat, "choose", spy)
    lowered(memory, **changes)
    monkeypatch.setattr(remat, "choose", choose)
    return choose(found.__getitem__, found["room"]), found


def test_that_is_chosen_which_fits_and_computes_least_twice():
    kept = {"none": 100, "dots": 30, "full": 5}
    assert [remat.choose(kept.__getitem__, room) for room in (100, 99, 30, 29, 0)] == [
        *["none", "dots", "dots", "full", "full"],
    ]


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_layers_that_are_no_loop_are_computed_again_too(policy):
    """Without a barrier the compiler finds that both computations are the same, and keeps the first."""
    assert "optimization_barrier" in lowered(policy=policy, unroll=True).as_text()
    assert "optimization_barrier" not in lowered(policy="none", unroll=True).as_text()


def test_a_device_that_does_not_tell_its_memory_has_room_for_all():
    assert remat.memory() is None  # a CPU
    assert remat.room(held=10, memory=110) == 80
    assert remat.room(held=200, memory=110) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_predicted_is_what_the_compiler_allocates(monkeypatch, dropout):
    _, kept = chosen(monkeypatch, GIB, dropout=dropout)
    assert kept["none"] > kept["dots"] > 2 * kept["full"] > 0
    sizes = {
        policy: lowered(policy=policy, dropout=dropout).compile().memory_analysis().temp_size_in_bytes
        for policy in ("none", "full")
    }
    assert sizes["none"] - sizes["full"] == pytest.approx(kept["none"] - kept["full"], rel=0.25)


@pytest.mark.slow
def test_each_memory_has_its_policy_and_the_program_is_that_of_the_setting(monkeypatch):
    _, kept = chosen(monkeypatch, GIB)
    held = GIB - round(kept["room"] / remat.SHARE)
    for policy in ("none", "dots", "full"):
        memory = held + round(1.05 * kept[policy] / remat.SHARE)
        assert chosen(monkeypatch, memory)[0] == policy
        assert lowered(memory).as_text() == lowered(policy=policy).as_text()


@pytest.mark.slow
def test_accumulated_parts_keep_less(monkeypatch):
    whole, part = (chosen(monkeypatch, GIB, batch_size=8, accumulate=n)[1]["none"] for n in (1, 4))
    assert part == pytest.approx(whole / 4, rel=0.01)


def test_devices_share_what_is_kept():
    def loss(weights, batch):
        return (jax.numpy.sin(batch["x"] * weights) ** 2).sum()

    batch = {"x": jax.ShapeDtypeStruct((16, 5), "float32")}
    alone = remat.kept_bytes(loss, jax.numpy.ones(5), batch)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 4, 1), mesh.AXES)):
        assert alone == 8 * remat.kept_bytes(loss, jax.numpy.ones(5), batch) > 0


@pytest.mark.parametrize("gated", [True, False])
def test_a_feed_forward_block_keeps_its_products_alone(gated):
    block = FeedForward(jax.random.key(0), tiny.settings(gated=gated))
    x = jax.ShapeDtypeStruct((2, 7, block.gate.kernel.shape[0]), "float32")
    residuals = jax.eval_shape(lambda x: jax.vjp(block, x)[1], x)
    wide = [leaf for leaf in jax.tree.leaves(residuals) if leaf.shape == (2, 7, block.gate.kernel.shape[1])]
    assert len(wide) == 1 + gated

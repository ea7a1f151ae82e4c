"""Adafactor's slots in T5X checkpoints: ours after the same step, whether layers are scanned or not."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import t5x_fixture
import tiny
from t5x_fixture import copied, scanned, weights, write

from softprompt_jax import Run, train
from softprompt_jax.checkpoints.backbone import load_adafactor, load_backbone
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.config import UserError, parse
from softprompt_jax.methods.trainable import Leaf
from softprompt_jax.optim.optimizers import Adafactor, build, restored
from softprompt_jax.trees import unflatten


@pytest.fixture(scope="module")
def expected(shared_fixtures) -> dict[str, np.ndarray]:
    return weights(t5x_fixture.model(shared_fixtures))


@pytest.fixture(scope="module")
def flat(shared_fixtures) -> dict[str, np.ndarray]:
    return t5x_fixture.parameters(shared_fixtures)


@pytest.mark.parametrize("layout", ["t5_1_1_tiny_f32", "t5_1_1_tiny_legacy_gfile", "t5_1_1_tiny_orbax"])
def test_adafactors_slots_lie_as_our_weights_do(shared_fixtures, expected, layout):
    step, slots = load_adafactor(shared_fixtures / "t5x" / layout)
    assert step == 1_100_000
    assert {path: {name: value.shape for name, value in slot.items()} for path, slot in slots.items()} == {
        path: {"v": weight.shape}
        for path, weight in expected.items()  # all too small to be factored
    }
    _, inline = load_adafactor(shared_fixtures / "t5x" / "t5_1_1_tiny_legacy_gfile")
    for path, slot in slots.items():
        np.testing.assert_array_equal(slot["v"], inline[path]["v"])  # these are zeros: the next test tells them apart


def test_slots_turn_and_stack_with_their_weights(flat, tmp_path):
    """Slots that tell where they belong: v is the weight, v_row and v_col its means."""
    slots: dict = {}
    for name, value in flat.items():
        matrix = value.ndim == 2 and min(value.shape) > 32
        unused = np.zeros(1, np.float32)
        slot = {"m": unused, "v": unused if matrix else value}
        slot |= {"v_row": value.mean(1) if matrix else unused, "v_col": value.mean(0) if matrix else unused}
        place = slots
        for part in name.split("/"):
            place = place.setdefault(part, {})
        place.update(slot)
    folder = write(tmp_path, flat, slots)
    step, found = load_adafactor(folder)
    assert step == 7
    for path, weight in weights(load_backbone(folder).model).items():
        if "v" in found[path]:
            np.testing.assert_array_equal(found[path]["v"], weight, err_msg=path)
        else:
            np.testing.assert_allclose(found[path]["v_row"], weight.mean(-1), atol=1e-6, err_msg=path)
            np.testing.assert_allclose(found[path]["v_col"], weight.mean(-2), atol=1e-6, err_msg=path)
    assert {frozenset(slot) for slot in found.values()} == {frozenset({"v"}), frozenset({"v_row", "v_col"})}


# Where our stacked weights stand in T5X, and whether the output has the model's width.
SCANNED = {
    "attention.query.kernel": ("{own}attention/query/kernel", False),
    "attention.key.kernel": ("{own}attention/key/kernel", False),
    "attention.value.kernel": ("{own}attention/value/kernel", False),
    "attention.output.kernel": ("{own}attention/out/kernel", True),
    "cross.query.kernel": ("encoder_decoder_attention/query/kernel", False),
    "cross.key.kernel": ("encoder_decoder_attention/key/kernel", False),
    "cross.value.kernel": ("encoder_decoder_attention/value/kernel", False),
    "cross.output.kernel": ("encoder_decoder_attention/out/kernel", True),
    "feed_forward.gate.kernel": ("mlp/wi/kernel", False),
    "feed_forward.down.kernel": ("mlp/wo/kernel", True),
    "attention_norm.scale": ("pre_{own}attention_layer_norm/scale", False),
    "cross_norm.scale": ("pre_cross_attention_layer_norm/scale", False),
    "feed_forward_norm.scale": ("pre_mlp_layer_norm/scale", False),
}


@pytest.mark.parametrize(
    ("axis", "heads", "width"),
    [(1, None, 128), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(1, 4, 128), (0, 4, 160)])],
    ids=["joined", "heads apart", "narrow, first"],
)
def test_factored_slots_of_scanned_layers_are_those_of_our_own_step(tmp_path, axis, heads, width):
    """The slots after a first step, by T5X's rules for joint arrays, are those of our optimizer after one."""
    sizes = {"vocabulary_rows": 200, "d_model": width, "d_kv": 32, "d_ff": 192, "num_heads": 4, "gated": False}
    gradients = weights(tiny.model(**sizes, tied=True))
    parameters, slots = {}, {}
    unused = np.zeros(1, np.float32)

    def put(name: str, weight: np.ndarray, **slot: np.ndarray) -> None:
        parameters[name] = weight
        place = functools.reduce(lambda place, part: place.setdefault(part, {}), name.split("/"), slots)
        place.update(dict.fromkeys(("m", "v", "v_row", "v_col"), unused), **slot)

    def factored(squares: np.ndarray, rows: list[int], columns: list[int]) -> dict[str, np.ndarray]:
        return {"v_row": squares.mean(tuple(columns)), "v_col": squares.mean(tuple(rows))}

    for path, gradient in gradients.items():
        stack, layers, part = path.partition(".layers.")
        if not layers:
            continue
        theirs, width_is_output = SCANNED[part]
        name = f"{stack}/layers/{theirs.format(own='self_' if stack == 'decoder' else '')}"
        apart = heads is not None and "attention/" in theirs and "kernel" in theirs
        shape = {True: (heads, 32, width), False: (width, heads, 32)}[width_is_output] if apart else gradient.shape[1:]
        weight = np.stack([layer.reshape(shape) for layer in gradient], axis)
        if part.endswith("scale"):
            put(name, weight, v=weight**2)
            continue
        own = [number for number in range(weight.ndim) if number != axis]
        rows = own[-1:] if width_is_output else own[:1]
        put(name, weight, **factored(weight**2, rows, [number for number in own if number not in rows]))
    put("token_embedder/embedding", gradients["embedding"], **factored(gradients["embedding"] ** 2, [1], [0]))
    for stack in ("encoder", "decoder"):
        for name, path in (("relpos_bias/rel_embedding", "bias.table"), (f"{stack}_norm/scale", "norm.scale")):
            weight = gradients[f"{stack}.{path}"].T
            put(f"{stack}/{name}", weight, v=weight**2)
    found = load_adafactor(write(tmp_path, parameters, slots))[1]

    leaves = {path: Leaf(".layers." in path, 1.0) for path in gradients}
    optimizer = build(Adafactor(step_origin=0, clipping=None, weight_decay=0), optax.constant_schedule(1.0), leaves)
    assert isinstance(optimizer, optax.GradientTransformation)
    params = unflatten(gradients)
    fresh = optimizer.init(params)
    assert found.keys() == gradients.keys()
    after, taken = jax.jit(optimizer.update)(params, fresh, params)[1], restored(fresh, found, "here")
    for path, slot in found.items():
        assert set(slot) == ({"v_row", "v_col"} if "kernel" in path or path == "embedding" else {"v"})
        for name in slot:
            expected, value = (getattr(state[0][path], name) for state in (after, taken))
            np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=f"{path} {name}")


@pytest.mark.parametrize("axis", [0, 1])
def test_slots_of_scanned_layers_are_those_of_layers_of_their_own(flat, tmp_path, axis):
    """Moments that are not factored, stacked as scanned models have them."""
    moments = {name: value + 1 for name, value in flat.items()}  # t5x's own are zeros still

    def read(folder: Path, arrays: dict[str, np.ndarray], moments: dict[str, np.ndarray]) -> dict:
        slots: dict = {}
        for name, value in moments.items():
            functools.reduce(lambda place, part: place.setdefault(part, {}), name.split("/"), slots)["v"] = value
        return load_adafactor(write(folder, arrays, slots))[1]

    expected = read(tmp_path / "alone", flat, moments)
    found = read(tmp_path / "scanned", scanned(flat, axis), scanned(moments, axis))
    assert found.keys() == expected.keys()
    for path, slot in found.items():
        np.testing.assert_array_equal(slot["v"], expected[path]["v"], err_msg=path)


def test_factored_slots_of_no_known_reading_are_refused_with_both(flat, tmp_path):
    kernels = [flat[f"encoder/layers_{number}/mlp/wo/kernel"] for number in (0, 1)]
    stacked = scanned(flat, 1)

    def slots(row: np.ndarray, column: np.ndarray) -> dict:
        return {"encoder": {"layers": {"mlp": {"wo": {"kernel": {"v_row": row, "v_col": column}}}}}}

    square = np.stack(kernels, 1) ** 2  # [F, L, D]
    row, column = square.mean(0), square.mean(2)
    for given in (slots(row, column), slots(column, row)):  # of unlike lengths: the shapes tell
        _, found = load_adafactor(write(tmp_path, stacked, given))
        slot = found["encoder.layers.feed_forward.down.kernel"]
        np.testing.assert_allclose(slot["v_row"], np.stack([k**2 for k in kernels]).mean(1), rtol=1e-5)
        np.testing.assert_allclose(slot["v_col"], np.stack([k**2 for k in kernels]).mean(2), rtol=1e-5)
    over_layers = square.mean(1)
    wrong = write(tmp_path, stacked, slots(over_layers.mean(0), over_layers.mean(1)))
    with pytest.raises(
        UserError,
        match=r"v_col of encoder.layers.mlp.wo.kernel: found \[64\], \[128\]; "
        r"expected \[2, 64\], \[128, 2\] or \[128, 2\], \[2, 64\]; start without slots",
    ) as caught:
        load_adafactor(wrong)
    assert "\n" not in str(caught.value)


def test_zeros_of_slots_may_have_been_left_out(shared_fixtures, tmp_path):
    folder = copied(shared_fixtures, "t5_1_1_tiny_f32", tmp_path)
    (folder / "state.param_states.encoder.encoder_norm.scale.v" / "0").unlink()
    np.testing.assert_array_equal(load_adafactor(folder)[1]["encoder.norm.scale"]["v"], np.zeros(64, np.float32))


@pytest.mark.slow
def test_model_tuning_goes_on_from_the_slots_of_its_checkpoint(flat, small, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    slots: dict = {}
    for name, value in flat.items():
        place = functools.reduce(lambda place, part: place.setdefault(part, {}), name.split("/"), slots)
        place.update({slot: np.zeros(1, np.float32) for slot in ("m", "v_row", "v_col")}, v=1e6 * value**2)
    checkpoint = write(tmp_path / "checkpoint_7", flat, slots)
    shutil.copy(small.backbone / "spiece.model", checkpoint)
    settings = small.short | {
        **{"backbone": str(checkpoint), "methods": [{"kind": "full"}], "steps": 1},
        "optimizer": {"kind": "adafactor", "learning_rate": 1e-3, "restore": True},
    }
    train(parse(Run, settings, "test"), tmp_path / "run")
    state = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).restore(1)["optimizer"]
    kept = 1 - 8**-0.8  # of the moments, at T5X's step 7
    expected = {path: 1e6 * kept * leaf**2 for path, leaf in weights(load_backbone(checkpoint).model).items()}
    found = {path: np.asarray(moments["v"]) for path, moments in state[0].items()}
    assert found.keys() == expected.keys()
    for path, value in found.items():  # the gradient's squares are nothing beside them
        np.testing.assert_allclose(value, expected[path], rtol=1e-3, atol=100, err_msg=path)
    scratch = {"settings": t5x_fixture.SETTINGS.model_dump()}
    with pytest.raises(UserError, match=r"optimizer.restore with random weights; expected a T5X checkpoint"):
        parse(Run, {"task": "rte", "backbone": scratch, "optimizer": {"restore": True}}, "test")

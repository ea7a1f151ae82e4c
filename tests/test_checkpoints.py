"""Checkpoints: complete or absent, the latest and the best stay, a broken one is told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from softprompt_jax.checkpoints import training_state
from softprompt_jax.checkpoints.training_state import GROUPS, MEMBERS, Checkpoints, best_or_latest
from softprompt_jax.config import UserError


def state(value: float):
    return {
        "trainable": {"prompt": {"rows": jnp.full((3, 4), value)}},
        "optimizer": [{"prompt.rows": jnp.full((2,), value)}, (), {"count": jnp.int32(value)}],
        "step": jnp.int32(value),
    }


def saved(folder, scores: dict[int, float | None]) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step, score in scores.items():
        checkpoints.save(step, state(step), score)
    checkpoints.wait()
    return checkpoints


def steps(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ({1: 0.1, 2: 0.5, 3: 0.2}, 2, {"2", "3"}),
        ({1: 0.5, 2: 0.5, 3: 0.5}, 1, {"1", "3"}),  # of equal ones the earliest
        ({1: 0.1, 2: None, 3: 0.2, 4: None}, 3, {"3", "4"}),  # what was not scored is never the best
        ({1: -2.0, 2: -1.0, 3: None}, 2, {"2", "3"}),
        ({1: 0.8, 2: float("nan"), 3: 0.7}, 1, {"1", "3"}),  # what is no number neither
        ({1: 0.1, 2: 0.5}, 2, {"1", "2"} - {"1"}),
    ],
)
def test_latest_and_best_stay(tmp_path, scores, best, kept):
    checkpoints = saved(tmp_path, scores)
    assert (checkpoints.best(), checkpoints.latest()) == (best, max(scores))
    checkpoints.close()
    assert steps(tmp_path) == kept
    reopened = Checkpoints(tmp_path)
    assert (reopened.best(), reopened.latest()) == (best, max(scores))
    reopened.close()


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 2.0, 2.0], 2),  # of equal scores the lowest loss, of equal losses the earliest
        ([None, 2.0, 1.0], 1),  # an older version had no losses, and chose the earliest
        ([None, None, 1.0], 1),
    ],
)
def test_of_equal_scores_the_lowest_loss_is_the_best(tmp_path, losses, best):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(step, state(step), 0.5, loss)
        checkpoints.wait()
        assert checkpoints.best() == best
    assert steps(tmp_path) == {str(best), "3"}
    with contextlib.closing(Checkpoints(tmp_path)) as reopened:
        reopened.score(3, 0.5, -1.0)  # a lower one that was measured later
        assert reopened.best() == (3 if losses[0] is not None else best)


def test_a_step_that_is_scored_later_is_the_best_from_then_on(tmp_path):
    checkpoints = saved(tmp_path, {1: 0.1, 2: None})
    assert checkpoints.best() == 1
    checkpoints.score(2, 0.5)
    assert checkpoints.best() == 2
    checkpoints.close()
    reopened = Checkpoints(tmp_path)
    reopened.score(2, 0.5)
    reopened.save(3, state(3), 0.2)
    reopened.wait()
    assert (reopened.best(), reopened.latest()) == (2, 3)
    reopened.close()
    assert steps(tmp_path) == {"2", "3"}


def test_nothing_saved_is_no_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.latest() is None
    checkpoints.close()


def test_state_comes_back_to_the_bit(tmp_path):
    checkpoints = saved(tmp_path, {7: 0.5})
    for restored in (checkpoints.restore(7, state(0)), checkpoints.restore(7)):
        np.testing.assert_array_equal(restored["trainable"]["prompt"]["rows"], np.full((3, 4), 7, np.float32))
        assert restored["step"] == 7
        assert restored["step"].dtype == jnp.int32
    checkpoints.close()


def test_saving_copies_before_it_returns(tmp_path):
    # Training donates the state's buffers to its next step.
    checkpoints, first = Checkpoints(tmp_path), state(1)
    checkpoints.save(1, first, 0.1)
    first["trainable"]["prompt"]["rows"].delete()
    np.testing.assert_array_equal(checkpoints.restore(1)["trainable"]["prompt"]["rows"], np.ones((3, 4)))
    checkpoints.close()


def test_what_a_kill_left_is_no_step_and_is_removed(tmp_path):
    saved(tmp_path, {1: 0.1, 2: 0.05}).close()
    # Names as Orbax gives them: a write that was not finished, and a deletion that was not.
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "3.orbax-checkpoint-tmp" / "default")
    (tmp_path / "0" / "default").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest(), checkpoints.best()) == (2, 1)
    checkpoints.save(3, state(3), 0.2)
    checkpoints.close()
    assert steps(tmp_path) == {"3"}


def test_reading_changes_nothing(tmp_path):
    saved(tmp_path, {1: 0.5, 2: 0.1}).close()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(map(str, tmp_path.rglob("*")))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert (checkpoints.latest(), checkpoints.best()) == (2, 1)
    assert checkpoints.restore(1)["step"] == 1
    checkpoints.close()
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("broken", ["gone", "cut"])
def test_broken_checkpoint_is_one_line_that_names_it(tmp_path, broken):
    saved(tmp_path, {1: 0.5, 2: 0.1}).close()
    for path in list((tmp_path / "2" / "default").rglob("*")):
        if path.is_file() and broken == "gone":
            path.unlink()
        elif path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="2: cannot be read") as error:
        checkpoints.restore(2, state(0))
    assert "\n" not in str(error.value)
    assert "delete this folder to go on from the one before" in str(error.value)
    assert checkpoints.restore(1, state(0))["step"] == 1
    checkpoints.close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": Failed: No space left on device [os_error_code='28']"),
    ],
    ids=["system", "tensorstore"],
)
def test_full_disk_is_one_line(tmp_path, monkeypatch, error):
    checkpoints = Checkpoints(tmp_path)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=r"a checkpoint cannot be written \(No space left on device\)"):
        checkpoints.save(1, state(1))
    checkpoints.close()


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a checkpoint cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize(
    ("scores", "step"),
    [({1: 0.5, 2: 0.1}, 1), ({1: None, 2: None}, 2), ({2: float("nan")}, 2)],
    ids=["the best", "none has a score: the latest", "a score that is no number"],
)
def test_an_unfinished_run_has_a_best_or_a_latest_tree(tmp_path, scores, step):
    saved(tmp_path / "checkpoints", scores).close()
    tree, found = best_or_latest(tmp_path)
    assert found == step
    np.testing.assert_array_equal(tree["prompt"]["rows"], np.full((3, 4), step, np.float32))


def test_a_member_of_a_sweep_is_read_from_the_state_of_its_group(tmp_path):
    group = tmp_path / GROUPS / "a0"
    group.mkdir(parents=True)
    (group / MEMBERS).write_text('["seed=0", "seed=1"]')
    prompts = [{"prompt": {"rows": jnp.stack([jnp.full((3, 4), 10.0 * i + j) for j in range(2)])}} for i in range(2)]
    marks = {"best_step": np.array([0, 4], np.int32), "best_score": np.zeros(2, np.float32)}
    with contextlib.closing(Checkpoints(group / "checkpoints")) as checkpoints:
        checkpoints.save(6, [{"trainable": prompts[0], "step": jnp.zeros(2)}, prompts[1], marks])
    for member, value, step in (("seed=0", 0, 6), ("seed=1", 11, 4)):  # without a validation yet, and with a best
        (tmp_path / member).mkdir()
        tree, found = best_or_latest(tmp_path / member)
        assert found == step
        np.testing.assert_array_equal(tree["prompt"]["rows"], np.full((3, 4), value, np.float32))


def test_a_run_without_a_checkpoint_is_one_line_and_stays_as_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="run: has no checkpoint yet; expected one; wait for the run's first"):
        best_or_latest(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


# ------------------------------------------------------------------------------------ damaged, exchanged, renamed


def exchange(folder, one, other):
    for source, to in ((one, "aside"), (other, one), ("aside", other)):
        (folder / source).rename(folder / to)


def flip(folder):
    """Change a bit of the array that is saved last in a step, where Orbax does not notice it: in its metadata."""
    path = folder / "metrics" / "metrics"
    path.write_text(path.read_text().replace('"score": 0.1', '"score": 0.3'))


DAMAGES = {
    "exchanged contents": lambda folder: exchange(folder, "1/default", "2/default"),
    "metadata of another step": lambda folder: shutil.copy(folder / "1/metrics/metrics", folder / "2/metrics/metrics"),
    "another score": lambda folder: flip(folder / "2"),
    "empty metadata": lambda folder: (folder / "2/metrics/metrics").write_text(""),
    "half of the metadata": lambda folder: (folder / "2/metrics/metrics").write_text('{"score": 0.1, "st'),
    "binary metadata": lambda folder: (folder / "2/metrics/metrics").write_bytes(b"\xff\xfe\x00\x80"),
    "a list": lambda folder: (folder / "2/metrics/metrics").write_text("[]"),
    "nothing in it": lambda folder: (folder / "2/metrics/metrics").write_text("{}"),
    "nesting": lambda folder: (folder / "2/metrics/metrics").write_text("[" * 100_000),
    "no metadata": lambda folder: (folder / "2/metrics/metrics").unlink(),
    "renamed": lambda folder: (folder / "2").rename(folder / "7"),
}


def test_deeply_nested_metadata_of_the_arrays_are_damage_too(tmp_path):
    saved(tmp_path, {1: 0.5, 2: 0.1}).close()
    (tmp_path / "2" / "default" / "_METADATA").write_text("[" * 100_000)
    said: list[str] = []
    with contextlib.closing(Checkpoints(tmp_path, report=said.append)) as checkpoints:
        restored, step = checkpoints.restore_newest(state(0))
    assert (step, restored["step"]) == (1, 1)
    assert "/2: cannot be read (RecursionError" in said[0]
    assert "going on from step 1" in said[0]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, damage):
    saved(tmp_path, {1: 0.5, 2: 0.1}).close()
    damage(tmp_path)
    name = "7" if (tmp_path / "7").exists() else "2"
    if damage is not DAMAGES["exchanged contents"]:  # of which neither is good, and arrays are read later
        with pytest.raises(UserError, match=rf"/{name}: .*delete this folder") as error:
            Checkpoints(tmp_path, read_only=True)
        assert "\n" not in str(error.value)
        said: list[str] = []
        with contextlib.closing(Checkpoints(tmp_path, report=said.append)) as checkpoints:
            assert checkpoints.latest() == 1
            restored, step = checkpoints.restore_newest(state(0))
            assert (step, restored["step"]) == (1, 1)
            checkpoints.save(2, state(2), 0.7)
        assert len(said) == 1
        assert said[0].startswith(f"{tmp_path}/{name}: ")
        assert said[0].endswith(f"; renamed to {name}.damaged, going on from step 1")
        assert steps(tmp_path) == {"2", f"{name}.damaged"}  # what was damaged is still there
    else:
        with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
            with pytest.raises(UserError, match=r"/2: .* is not what was saved \(its checksum differs\)"):
                checkpoints.restore_newest(state(0))
            for like in (None, state(0)):
                with pytest.raises(UserError, match=r"/1: .* is not what was saved"):
                    checkpoints.restore(1, like)
        assert steps(tmp_path) == {"1", "2"}


def test_two_exchanged_checkpoints_are_refused_and_stay(tmp_path):
    saved(tmp_path, {1: 0.5, 2: 0.1}).close()
    exchange(tmp_path, "1", "2")
    with pytest.raises(UserError, match=r"/2: is that of step 1 \(exchanged or renamed\)"):
        Checkpoints(tmp_path)
    assert steps(tmp_path) == {"1", "2"}


def test_arrays_of_the_newest_that_cannot_be_read_are_set_aside(tmp_path):
    saved(tmp_path, {1: 0.5, 2: 0.1}).close()
    shutil.rmtree(tmp_path / "2" / "default" / "d")
    said: list[str] = []
    with contextlib.closing(Checkpoints(tmp_path, report=said.append)) as checkpoints:
        restored, step = checkpoints.restore_newest(state(0))
        assert (step, restored["step"], checkpoints.latest(), len(said)) == (1, 1, 1, 1)
        checkpoints.save(2, state(2), 0.1)
        assert checkpoints.restore(2)["step"] == 2


def test_a_checkpoint_without_checksums_is_that_of_an_older_version(tmp_path):
    saved(tmp_path, {1: 0.5}).close()
    path = tmp_path / "1" / "metrics" / "metrics"
    path.write_text('{"score": 0.5, "loss": null, "step": 1}')
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        restored, step = checkpoints.restore_newest(state(0))
        assert (step, restored["step"], checkpoints.pending(1)) == (1, 1, None)


def test_what_the_next_line_says_comes_back(tmp_path):
    pending = {"loss": [0.1, float("inf")], "steps": 3}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state(1), pending=pending)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.pending(1) == pending


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_checksums_are_the_same_here_and_on_devices_and_tell_bits_and_places(dtype):
    values = jnp.arange(60).reshape(3, 4, 5).astype(dtype)
    here = training_state._sum(np.asarray(values), np)
    assert here == training_state._sum_on_device(values)
    flat = np.asarray(values).ravel()
    for changed in (flat[::-1], np.roll(flat, 1), np.where(np.arange(60) == 33, flat[0], flat)):
        assert training_state._sum(changed.reshape(3, 4, 5), np) != here
    assert training_state._sum(np.arange(3), np) != training_state._sum(np.arange(3)[::-1], np)  # 64 bits
    assert training_state._sum(np.float32(2), np) == training_state._sum_on_device(jnp.float32(2))

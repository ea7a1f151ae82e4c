"""Prompts of other tasks and backbones: how alike they are, and how they are carried over."""

from __future__ import annotations

import numpy as np
import pytest
import small_runs
import tiny_lm

from softprompt_jax.analysis.transfer import rank_sources, recycle, recycle_prompt, shared_pieces, similarity
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.inference.predictor import load_predictor


def rows(seed: int, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, width)).astype(np.float32)


def test_similarity_is_a_cosine_of_means_or_of_all_pairs_and_knows_no_order():
    one, other = rows(0), rows(1)[:3]
    means = one.mean(0), other.mean(0)
    expected = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert similarity(one, other) == pytest.approx(expected, abs=1e-6)
    pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in one for b in other]
    assert similarity(one, other, "rows") == pytest.approx(np.mean(pairs), abs=1e-6)
    for measure in ("mean", "rows"):
        assert similarity(one, 3 * other[::-1], measure) == pytest.approx(similarity(one, other, measure), abs=1e-6)
    assert similarity(one, one) == pytest.approx(1)
    assert similarity(one, -one) == pytest.approx(-1)


def test_sources_are_ranked_from_the_most_alike(tmp_path):
    target = rows(0)
    for name, value in {"far": -target, "near": target + 0.1 * rows(1), "between": rows(2)}.items():
        artifact.save_prompt(value, tmp_path / f"{name}.safetensors", {"task": name, "fingerprint": "a"})
    np.save(tmp_path / "target.npy", target)
    ranked = rank_sources(tmp_path / "target.npy", [tmp_path / f"{n}.safetensors" for n in ("far", "between", "near")])
    assert [entry["task"] for entry in ranked] == ["near", "between", "far"]
    assert ranked[-1]["similarity"] == pytest.approx(-1)
    artifact.save_prompt(target, tmp_path / "other.safetensors", {"fingerprint": "b", "backbone": "other"})
    with pytest.raises(UserError, match=r"trained on backbone other.*expected one backbone"):
        rank_sources(tmp_path / "near.safetensors", [tmp_path / "other.safetensors"])
    np.save(tmp_path / "wide.npy", rows(0, 20))
    with pytest.raises(UserError, match=r"wide.npy: prompts: found widths 16 and 20"):
        rank_sources(tmp_path / "target.npy", [tmp_path / "wide.npy"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Backbone:
    """Return a backbone of width 24 whose words are a linear map of the small one's."""
    return load_backbone(small_runs.write_backbone(tmp_path_factory.mktemp("wide"), width=24, seed=1))


def test_pieces_in_common_are_pieces_and_no_special_ones(small, wide):
    tokenizer = load_tokenizer(small.backbone)
    pairs = shared_pieces(load_backbone(small.backbone), wide)
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])  # both were trained on one text
    assert set(pairs[:, 0]) == set(range(tokenizer.size)) - tokenizer.special_ids


def test_a_prompt_goes_from_a_t5_to_a_decoder_only_model(tmp_path):
    """SentencePiece and byte-level vocabularies meet: "▁the" is "Ġthe"."""
    t5, lm = load_backbone("embedded"), load_backbone(tiny_lm.folder(tmp_path / "lm"))
    pairs = shared_pieces(t5, lm)
    ours, theirs = (load_tokenizer(each.folder, each.text_format).pieces for each in (t5, lm))
    words = {(ours[i], theirs[j]) for i, j in pairs}
    assert {("▁the", "Ġthe"), ("▁film", "Ġfilm"), ("s", "s")} <= words
    recycled = recycle(rows(0, 160), t5, lm)
    assert (recycled.rows.shape, recycled.pieces) == ((5, 32), len(pairs))


@pytest.mark.slow
def test_a_prompt_follows_the_map_between_the_vocabularies(small, wide):
    source = load_backbone(small.backbone)
    matrix = np.random.default_rng(3).normal(size=(16, 24)).astype(np.float32)
    wide.model.embedding[...] = source.model.embedding[...] @ matrix
    prompt = np.asarray(source.model.embedding[...])[[5, 9, 17]]
    linear = recycle(prompt, source, wide)
    assert linear.error < 0.05
    expected = prompt @ matrix
    assert np.abs(linear.rows - expected).max() < 0.2 * np.abs(expected).mean()
    network = recycle(prompt, source, wide, "network")
    assert network.rows.shape == (3, 24)
    assert np.abs(network.rows - expected).mean() < 0.2 * np.abs(expected).mean()  # it has seen these words
    # Words that have nothing to do with each other cannot be carried over, and the error says so.
    wide.model.embedding[...] = np.random.default_rng(4).normal(size=(160, 24)).astype(np.float32)
    assert recycle(prompt, source, wide).error > 0.9


def test_a_recycled_file_is_read_on_its_new_backbone_and_refused_on_the_old(small, wide, tmp_path):
    old = tmp_path / "old.safetensors"
    fingerprint = load_backbone(small.backbone).fingerprint()
    about = {"backbone": str(small.backbone), "fingerprint": fingerprint, "task": "moods", "place": "after"}
    artifact.save_prompt(rows(0), old, about)
    report = recycle_prompt(old, str(wide.folder), tmp_path / "new" / "rows.safetensors")
    assert report["rows"] == [5, 24]
    predictor = load_predictor(tmp_path / "new" / "rows.safetensors", str(wide.folder))
    assert predictor.model.prompt.layout.lengths == (5, 0)
    with pytest.raises(UserError, match="trained on backbone"):
        load_predictor(tmp_path / "new" / "rows.safetensors", str(small.backbone))


def test_what_cannot_be_carried_over_is_refused_in_a_line(small, wide, tmp_path, monkeypatch):
    source = load_backbone(small.backbone)
    with pytest.raises(UserError, match="found width 20; expected 16"):
        recycle(rows(0, 20), source, wide)
    np.save(tmp_path / "rows.npy", rows(0))
    with pytest.raises(UserError, match="says no backbone"):
        recycle_prompt(tmp_path / "rows.npy", str(wide.folder), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"expected a file name ending in .safetensors"):
        recycle_prompt(tmp_path / "rows.npy", str(wide.folder), tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"cannot be written \(.*\); expected a file in a writable folder"):
        recycle_prompt(tmp_path / "rows.npy", "x", tmp_path / "rows.npy" / "a.safetensors", backbone="y")
    monkeypatch.setattr("softprompt_jax.analysis.transfer.shared_pieces", lambda *_: np.zeros((3, 2), np.int64))
    with pytest.raises(UserError, match="have 3 pieces in common; expected 16 or more"):
        recycle(rows(0), source, wide)


def test_a_start_from_another_backbone_is_refused(refused, small, tmp_path, own_cache):
    values = np.zeros((4, 16), np.float32)
    artifact.save_prompt(values, tmp_path / "p.safetensors", {"backbone": "other", "fingerprint": "0" * 16})
    method = {"kind": "prompt", "length": 4, "init": {"kind": "file", "path": str(tmp_path / "p.safetensors")}}
    config = small_runs.write_config(tmp_path / "a.yaml", small.short | {"methods": [method]})
    said = refused("train", config, "--out", tmp_path / "run", "--quiet")
    assert "p.safetensors: trained on backbone other (0000000000000000), used on" in said
    assert "expected the same backbone; carry a prompt over with softprompt recycle, or give bare rows" in said

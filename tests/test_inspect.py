"""Reading prompts back: neighbours, clusters, labels and distances of rows that were made to have them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from small_runs import BAD

from softprompt_jax import load_backbone, load_run
from softprompt_jax.analysis import inspect
from softprompt_jax.assembly import assemble
from softprompt_jax.checkpoints.artifact import load_artifact, load_prompt, save_prompt
from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def made(small, prompt_run, tmp_path_factory):
    """Return a prompt: 3 times the row of "yes", nearly the same, and the row of another piece."""
    table = np.asarray(load_backbone(small.backbone).model.embedding[...])
    tokenizer = load_tokenizer(small.backbone)
    (yes,), (cold,) = tokenizer.encode("yes"), tokenizer.encode("cold")
    rows = np.stack([3 * table[yes], 3 * table[yes] + 0.01, table[cold]]).astype(np.float32)
    path = tmp_path_factory.mktemp("made") / "made.safetensors"
    save_prompt(rows, path, load_artifact(prompt_run).metadata)
    return path, rows, table, tokenizer


@pytest.fixture(scope="module")
def found(made, prompt_run):
    return inspect.inspect([made[0], prompt_run], neighbours=3)


def test_nearest_pieces_are_those_of_a_plain_search(made, found):
    _, rows, table, tokenizer = made
    ids = [i for i in range(tokenizer.size) if i not in tokenizer.special_ids]
    for row, line in zip(rows, found["prompts"][0]["rows"], strict=True):
        cosines = {i: row @ table[i] / np.linalg.norm(row) / np.linalg.norm(table[i]) for i in ids}
        best = sorted(ids, key=lambda i: -cosines[i])[:3]
        assert [piece for piece, _ in line["cosine"]] == [tokenizer.pieces[i] for i in best]
        np.testing.assert_allclose([value for _, value in line["cosine"]], [cosines[i] for i in best], rtol=1e-4)
        distances = {i: np.linalg.norm(row - table[i]) for i in ids}
        best = sorted(ids, key=lambda i: distances[i])[:3]
        assert [piece for piece, _ in line["euclid"]] == [tokenizer.pieces[i] for i in best]
        np.testing.assert_allclose([value for _, value in line["euclid"]], [distances[i] for i in best], atol=1e-2)
        near = [tokenizer.pieces.index(piece) for piece, _ in line["cosine"]]
        unit = table[near] / np.linalg.norm(table[near], axis=1, keepdims=True)
        pairs = [unit[i] @ unit[j] for i in range(3) for j in range(i)]
        assert line["tightness"] == pytest.approx(np.mean(pairs), abs=1e-5)
        assert line["norm"] == pytest.approx(np.linalg.norm(row), rel=1e-5)


def test_shared_neighbours_clusters_and_labels(found):
    prompt = found["prompts"][0]
    assert prompt["nearest_pieces"] == 2
    assert prompt["shared_neighbours"] == {"▁yes": [0, 1]}
    assert prompt["clusters"][0][:2] == [0, 1]
    assert prompt["labels"]["of"] == 2
    assert prompt["labels"]["rows"]["yes"][:2] == [0, 1]
    assert prompt["labels"]["survive"] == sum(bool(rows) for rows in prompt["labels"]["rows"].values())
    assert found["vocabulary"]["norm"]["least"] <= found["vocabulary"]["norm"]["mean"]


def test_a_label_is_found_where_all_its_pieces_are_neighbours_of_one_row(made, prompt_run, tmp_path):
    """A label of two pieces: that one of them is a neighbour of a row, or each of another row, is not enough."""
    _, _, table, tokenizer = made
    (yes,) = tokenizer.encode("yes")
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    far = min(BAD, key=lambda word: unit[tokenizer.encode(word)[0]] @ unit[yes])
    (other,) = tokenizer.encode(far)
    metadata = load_artifact(prompt_run).metadata
    settings = json.loads(metadata["settings"])
    settings["task"]["label_words"] = [f"yes {far}", far]
    metadata |= {"settings": json.dumps(settings)}
    save_prompt(np.stack([table[yes], table[other]]), tmp_path / "apart.safetensors", metadata)
    save_prompt(np.stack([unit[yes] + unit[other], table[other]]), tmp_path / "beside.safetensors", metadata)
    sources = [tmp_path / "apart.safetensors", tmp_path / "beside.safetensors"]
    apart, beside = (prompt["labels"] for prompt in inspect.inspect(sources, neighbours=2)["prompts"])
    assert apart == {"survive": 1, "of": 2, "rows": {f"yes {far}": [], far: [1]}}
    assert beside == {"survive": 2, "of": 2, "rows": {f"yes {far}": [0], far: [0, 1]}}


@pytest.mark.parametrize(("accuracy", "is_read"), [(0.5, False), (0.75, True)])
def test_labels_of_a_prompt_that_fails_are_not_read(prompt_run, tmp_path, accuracy, is_read):
    left_out = shutil.ignore_patterns("checkpoints", "trained.safetensors")  # which knows the result's checksum
    folder = shutil.copytree(prompt_run, tmp_path / "run", ignore=left_out)
    scores = {"accuracy": accuracy, "illegal": 0.0, "count": 16}
    result = {"validation": scores, "test": scores, "best_step": 10}
    result["baselines"] = {"split": "test", "majority": 0.5, "untrained": scores}
    (folder / "result.json").write_text(json.dumps(result))
    for source in (folder, folder / "prompt.safetensors"):
        found = inspect.inspect([source])
        assert found["prompts"][0]["above_majority"] is is_read
        text = "\n".join(inspect.describe(found))
        assert ("label words among the neighbours" in text) is is_read
        assert ("not above the majority class" in text) is not is_read
    shutil.move(folder / "prompt.safetensors", tmp_path / "alone.safetensors")  # of which nothing is known
    found = inspect.inspect([tmp_path / "alone.safetensors"])
    assert "label words among the neighbours" in "\n".join(inspect.describe(found))


def test_distance_from_the_start_is_that_from_what_the_settings_begin_with(prompt_run, found):
    start = np.asarray(assemble(load_run(prompt_run / "config.yaml")).model.prompt.table())
    rows = load_prompt(prompt_run)
    expected = np.linalg.norm(rows - start, axis=1)
    prompt = found["prompts"][1]
    np.testing.assert_allclose([line["from_start"] for line in prompt["rows"]], expected, rtol=1e-5)
    assert prompt["start"]["distance"] == pytest.approx(expected.mean(), rel=1e-5)
    assert expected.min() > 0


def test_distance_between_prompts(made, prompt_run, found):
    (pair,) = found["between"]
    one, other = made[1], load_prompt(prompt_run)
    assert pair["prompts"] == [str(made[0]), str(prompt_run)]
    assert pair["distance"] == pytest.approx(np.linalg.norm(one - other, axis=1).mean(), rel=1e-5)
    mean, others = one.mean(0), other.mean(0)
    cosine = mean @ others / np.linalg.norm(mean) / np.linalg.norm(others)
    assert pair["cosine_of_means"] == pytest.approx(cosine, abs=1e-5)
    assert 0 <= pair["pieces_in_common"] <= 1


def test_rows_on_a_plane_keep_what_differs():
    rows = np.array([[0, 0, 5], [3, 0, 5], [0, 4, 5]], np.float32)
    found = inspect.plane(rows)
    for i in range(3):
        for j in range(i):
            assert np.linalg.norm(found[i] - found[j]) == pytest.approx(np.linalg.norm(rows[i] - rows[j]), rel=1e-5)
    assert inspect.plane(rows[:1]).shape == (1, 2)


@pytest.mark.slow
def test_command_prints_lines_or_json_and_writes_a_page(softprompt, made, prompt_run, small, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = softprompt("inspect", made[0], prompt_run, "--to", tmp_path / "page")
    assert code == 0
    assert "row   0  norm" in out
    assert "2 different nearest pieces; 2 rows share theirs with another row" in out
    assert "cosine of means" in out
    assert err.splitlines()[0] == f"wrote {tmp_path / 'page' / 'index.html'}"
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "▁yes" in page
    assert "://" not in page  # which no picture in base64 can hold
    assert page.count("data:image/png;base64,") == 3
    for png in (tmp_path / "page").glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    # An array alone says neither backbone nor start.
    np.save(tmp_path / "rows.npy", made[1])
    alone = ("inspect", tmp_path / "rows.npy", "--backbone", small.backbone, "--to", tmp_path / "alone")
    assert softprompt(*alone)[0] == 0
    assert "distance from start</th></tr>" not in (tmp_path / "alone" / "index.html").read_text(encoding="utf-8")
    code, out, _ = softprompt(*alone, "--json")
    assert code == 0
    assert json.loads(out)["prompts"][0]["start"] is None
    assert json.loads(out)["prompts"][0]["labels"] is None


def test_what_cannot_be_read_is_one_line(made, small, tmp_path):
    np.save(tmp_path / "rows.npy", made[1])
    with pytest.raises(UserError, match="says no backbone; expected one; add --backbone"):
        inspect.inspect([tmp_path / "rows.npy"])
    np.save(tmp_path / "wide.npy", np.ones((2, 8), np.float32))
    with pytest.raises(UserError, match="rows of width 8; expected 16, that of backbone"):
        inspect.inspect([tmp_path / "wide.npy"], backbone=str(small.backbone))
    with pytest.raises(UserError, match="found 1 neighbours; expected 2 or more"):
        inspect.inspect([made[0]], neighbours=1)

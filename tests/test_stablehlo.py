"""A model as a program: another process, without this package, answers as we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import rows

import softprompt_jax
from softprompt_jax import UserError, load_predictor, load_prompt
from softprompt_jax.data.prompt_layout import EOS, PromptLayout
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.export.export import export
from softprompt_jax.models import decode

pytest.importorskip("flatbuffers", reason="this environment is older than pyproject.toml: make install")
pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = [row["text"] for row in rows()[:6]]
CHILD = """
import json, sys
sys.modules["softprompt_jax"] = None  # whoever imports it fails
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
folder, given = sys.argv[1], json.load(sys.stdin)
program = export.deserialize(bytearray(open(folder + "/program.stablehlo", "rb").read()))
weights = load_file(folder + "/weights.safetensors")
found = []
for texts in given["batches"]:
    more = [np.asarray(prompt, np.float32) for prompt in given["prompts"]] or [None]
    for prompt in more:
        inputs = [weights, np.asarray(texts, np.int32)] + ([] if prompt is None else [prompt])
        tokens, scores = jax.jit(program.call)(*inputs)
        found.append([np.asarray(tokens).tolist(), np.asarray(scores).tolist()])
json.dump(found, sys.stdout)
"""


def in_a_child(folder, batches, prompts=()) -> list:
    given = {"batches": [np.asarray(batch).tolist() for batch in batches], "prompts": [p.tolist() for p in prompts]}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def padded(tokenizer, texts, eos: bool) -> np.ndarray:
    ids = [[*tokenizer.encode(text), *([EOS] if eos else [])] for text in texts]
    made = np.zeros((len(ids), max(map(len, ids)) + 1), np.int32)
    for row, text in zip(made, ids, strict=True):
        row[: len(text)] = text
    return made


@pytest.mark.slow
def test_a_program_with_its_prompt_answers_in_another_process(prompt_run, tmp_path, softprompt):
    code, _, err = softprompt(
        "export", prompt_run, "--format", "stablehlo", "--to", tmp_path / "out", "--max-tokens", 3
    )
    assert (code, err) == (0, f"wrote {tmp_path / 'out'}\n")
    tokenizer = load_tokenizer(tmp_path / "out")
    batches = [padded(tokenizer, TEXTS, eos=True), padded(tokenizer, TEXTS[:2], eos=False)]
    (tokens, scores), (fewer, _) = in_a_child(tmp_path / "out", batches)
    predictor = load_predictor(prompt_run)
    predictor.max_tokens = 3
    assert [tokenizer.decode(row) for row in tokens] == predictor.texts(TEXTS)
    assert fewer == tokens[:2]
    encoder = predictor.model.prompt.layout.around_each(jnp.asarray(batches[0]))
    _, expected = decode.greedy(predictor.model, encoder, 3)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    about = json.loads((tmp_path / "out" / "program.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    program = (tmp_path / "out" / "program.stablehlo").read_bytes()
    assert b"decode.py" in program  # where each operation comes from
    for folder in (Path(softprompt_jax.__file__).parent, Path(jax.__file__).parent):
        assert str(folder).encode() not in program


@pytest.mark.slow
def test_a_prompt_can_go_in_with_the_text(prompt_run, tmp_path):
    export(prompt_run, "stablehlo", tmp_path / "out", 3, prompt_input=True)
    tokenizer, own = load_tokenizer(tmp_path / "out"), load_prompt(prompt_run)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "prompt.npy"), own)
    other = 3 * np.random.default_rng(0).normal(size=own.shape).astype(np.float32)
    batch = padded(tokenizer, TEXTS, eos=True)
    (first, first_scores), (second, second_scores) = in_a_child(tmp_path / "out", [batch], [own, other])
    predictor = load_predictor(prompt_run)
    predictor.max_tokens = 3
    assert [tokenizer.decode(row) for row in first] == predictor.texts(TEXTS)
    predictor.model.prompt.rows[...] = jnp.asarray(other)
    encoder = predictor.model.prompt.layout.around_each(jnp.asarray(batch))
    expected, expected_scores = decode.greedy(predictor.model, encoder, 3)
    np.testing.assert_array_equal(second, expected)
    np.testing.assert_allclose(second_scores, expected_scores, atol=1e-4)
    assert not np.allclose(first_scores, second_scores)
    done = subprocess.run(
        [sys.executable, tmp_path / "out" / "example.py", *map(str, tokenizer.encode(TEXTS[0]))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(token) for token in first[0] if token > 1]


def test_ids_stand_around_each_text_whatever_its_length():
    texts = np.asarray([[5, 6, 1, 0], [7, 0, 0, 0], [8, 9, 10, 11]], np.int32)
    found = PromptLayout((90, 91), (92,)).around_each(jnp.asarray(texts))
    assert np.asarray(found).tolist() == [
        [90, 91, 5, 6, 92, 1, 0, 0],
        [90, 91, 7, 92, 1, 0, 0, 0],
        [90, 91, 8, 9, 10, 11, 92, 1],
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("npy", "p.npy", 3), "--max-tokens and --prompt-input with npy; expected them with stablehlo only"),
        (("stablehlo", "out", None, True), "has no prompt that could be an input"),
    ],
)
def test_what_cannot_be_a_program_is_one_line(full_run, tmp_path, arguments, expected):
    format, to, *rest = arguments
    with pytest.raises(UserError, match=expected):
        export(full_run, format, tmp_path / to, *rest)
    assert not list(tmp_path.iterdir())

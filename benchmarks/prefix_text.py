"""How near an untrained prefix that begins as a text is to this text in front of the input.

    python benchmarks/prefix_text.py [--backbone embedded] [--examples 200] [--text "..."]

For movie sentences it compares what the model says of the label words: with the text in front of the sentence, with
the prefix, and with neither. Prints JSON: how often the likelier word is that of the text in front, and the mean KL
divergence from its distribution over the two words, in nats. In a decoder-only model the prefix is exact.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

TEXT = "Is this sentence about a film positive or negative?"


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--text", default=TEXT)
    arguments = parser.parse_args()
    from softprompt_jax.assembly import backbone_of
    from softprompt_jax.data.task import load
    from softprompt_jax.data.tokenizer import load_tokenizer
    from softprompt_jax.run import Run
    from softprompt_jax.tasks import get

    plain = Run(task=get("sentiment_movie"), backbone=arguments.backbone)  # type: ignore[arg-type]
    backbone = backbone_of(plain)
    tokenizer = load_tokenizer(backbone.folder, backbone.text_format, plain.text)
    front = [*tokenizer.bos, *tokenizer.encode(arguments.text)]
    init = {"kind": "text", "text": arguments.text}
    given = {"task": plain.task, "backbone": arguments.backbone}
    prefix = Run(methods=[{"kind": "prefix", "length": len(front), "init": init}], **given)  # type: ignore[arg-type]
    examples = load(plain.tasks[0], "test")[: arguments.examples]
    sentences = [tokenizer.input_ids(example.input) for example in examples]
    words = [tokenizer.target_ids(word) for word in plain.tasks[0].words or ()]
    wanted = said(backbone, plain, [[*front, *ids] for ids in sentences], words)
    found = {"text": arguments.text, "tokens": len(front), "examples": len(sentences)}
    for name, run in (("prefix", prefix), ("neither", plain)):
        other = said(backbone, run, sentences, words)
        agreement = np.mean(other.argmax(-1) == wanted.argmax(-1))
        divergence = np.sum(np.exp(wanted) * (wanted - other), -1).mean()
        found[name] = {"agreement": round(float(agreement), 3), "kl_nats": float(f"{divergence:.3g}")}
    print(json.dumps(found, indent=1))


def said(backbone, run, texts: list[list[int]], words: list[list[int]]) -> np.ndarray:
    """Return the log-probabilities of the words after each text, of these words alone [N, W]."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from softprompt_jax.assembly import assemble
    from softprompt_jax.models.decode import score_words

    model = assemble(run, backbone).model
    if run.methods[0].kind == "prompt":
        model.prompt = None  # the bare backbone
    padding = model.settings.padding
    longest = max(map(len, texts))
    rows = np.full((len(texts), -(-longest // 16) * 16), padding, np.int32)
    answers = np.full((len(words), max(map(len, words))), padding, np.int32)
    for table, lists in ((rows, texts), (answers, words)):
        for row, ids in zip(table, lists, strict=True):
            row[: len(ids)] = ids
    graphdef, state = nnx.split(model)
    score = jax.jit(lambda state, rows: score_words(nnx.merge(graphdef, state), rows, jnp.asarray(answers)))
    parts = np.array_split(rows, -(-len(rows) // 50))
    scores = np.concatenate([np.asarray(score(state, part)) for part in parts])
    return np.asarray(jax.nn.log_softmax(scores))


if __name__ == "__main__":
    main()

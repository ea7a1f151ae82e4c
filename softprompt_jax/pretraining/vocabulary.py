"""Train a T5 tokenizer: SentencePiece unigram pieces, nothing else (the 100 sentinels are not stored)."""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

import random
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from softprompt_jax.config import UserError
from softprompt_jax.files import writable
from softprompt_jax.pretraining.corpus import TextFile, read_documents, split_sentences

# Words of instructions and labels, so that the common ones are single pieces.
LABEL_WORDS = """positive negative neutral good bad great terrible yes no true false same different paraphrase
duplicate unrelated similar contradiction entailment neutral acceptable unacceptable spam ham sentence sentence1
sentence2 sentiment question context answer passage premise hypothesis word text message review movie film product
summary summarize translate title label option choice first second before after original swapped happy sad love hate
like dislike angry joy fear excellent awful boring funny best worst better worse nice poor wonderful horrible amazing
disappointing news novel speech manual joke story dictionary sports business science politics opinion fact
one two three four five zero none left right correct wrong""".split()


def train_tokenizer(
    texts: list[TextFile],
    out: str | Path,
    size: int = 8000,
    seed: int = 0,
    characters: int = 10_000_000,
) -> Path:
    """Write `spiece.model` into `out`, as T5's but for the size; return `out`.

    Ids: pad 0, eos 1, unk 2, then the pieces. Ours and transformers' T5 tokenizer add the sentinels:
    `<extra_id_99>` is `size`, `<extra_id_0>` is `size + 99`. No byte fallback: transformers' T5 tokenizer
    drops it. About `characters` of text are drawn; a file's share is its length times its weight.
    """
    out, sample = Path(out), _sample(texts, characters, seed)
    try:
        with writable(out, folder=True):
            _train(sample, out, size)
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)  # after the place in its source
        raise UserError(f"{out}: no tokenizer of {size} pieces ({' '.join(reason.split())})") from None
    (out / "spiece.vocab").unlink()
    finish(out / "spiece.model")
    return out


def _train(sample: list[str], out: Path, size: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_prefix=str(out / "spiece"),
        model_type="unigram",
        vocab_size=size,
        character_coverage=0.9999,
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        max_sentence_length=20_000,
        num_threads=1,
        minloglevel=1,
    )


def finish(model: str | Path) -> None:
    """Round the scores of pieces to multiples of 1/512 and forget the path, in place.

    Pieces such as "." and "..." tie in either order. SentencePiece adds scores in float32, transformers in
    float64: only sums that are exact in both break such ties alike. They are, for texts of up to 2,000 pieces.
    """
    path = Path(model)
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    for piece in proto.pieces:
        piece.score = round(piece.score * 512) / 512
    proto.trainer_spec.model_prefix = ""
    path.write_bytes(proto.SerializeToString())


def _sample(texts: list[TextFile], characters: int, seed: int) -> list[str]:
    """Draw sentences from every file; a file's share is its length times its weight."""
    draw = random.Random(seed)
    files = []
    for text in texts:
        sentences = [s for document in read_documents(text.path) for p in document for s in split_sentences(p)]
        files.append((sentences, sum(map(len, sentences)) * text.weight, text.weight))
    total = sum(share for _, share, _ in files)
    sample = []
    for sentences, _, weight in files:
        rate = characters / total * weight
        copies, rest = divmod(rate, 1.0) if sentences else (0, 0.0)
        for sentence in sentences:
            sample += [sentence] * (int(copies) + (draw.random() < rest))
    # Label words, in running text so that they start with a space; 150 times each outweighs their pieces.
    for _ in range(150):
        words = draw.sample(LABEL_WORDS, len(LABEL_WORDS))
        sample += [" ".join(words), ": ".join(words[:40]) + ":"]
    draw.shuffle(sample)
    return sample

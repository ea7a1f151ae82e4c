"""Train a tokenizer like T5's: SentencePiece's unigram pieces. The 100 sentinels are not stored."""

from __future__ import annotations

import random
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from softprompt_jax.config import UserError
from softprompt_jax.files import writable
from softprompt_jax.pretraining.corpus import TextFile, read_documents, split_sentences
from softprompt_jax.pretraining.phrases import WORDS


def train_tokenizer(texts: list[TextFile], out: Path, size: int = 8000, characters: int = 10_000_000) -> Path:
    """Write `spiece.model` with `size` pieces into the folder `out`, and return the folder.

    The ids are those of T5: padding 0, EOS 1, unknown 2, then the pieces. Our tokenizer and that of transformers add
    the sentinels: `<extra_id_99>` is `size`, `<extra_id_0>` is `size + 99`. There is no byte fallback, since
    transformers' T5 tokenizer has none. The pieces are learnt from about `characters` of the texts. A file's share of
    these is its length times its weight.
    """
    sample = _sample(texts, characters)
    try:
        with writable(out, folder=True):
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
            (out / "spiece.vocab").unlink()
            _finish(out / "spiece.model")
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)  # what follows the place in the library's source
        raise UserError(f"{out}: no tokenizer of {size} pieces ({' '.join(reason.split())})") from None
    return out


def _finish(path: Path) -> None:
    """Round the scores of pieces to multiples of 1/512, and take the path out of the file.

    Two ways to split a text can have equal scores, such as "." and "..." in either order. SentencePiece adds scores in
    float32 and transformers in float64, and both choose alike only if both sums are exact. Sums of multiples of 1/512
    are, for texts of up to 2,000 pieces.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    for piece in proto.pieces:
        piece.score = round(piece.score * 512) / 512
    proto.trainer_spec.model_prefix = ""
    path.write_bytes(proto.SerializeToString())


def _sample(texts: list[TextFile], characters: int) -> list[str]:
    """Draw about so many characters in whole sentences; a file's share is its length times its weight."""
    draw = random.Random(0)
    documents = [[p for document in read_documents(text.path) for p in document] for text in texts]
    files = [[s for p in paragraphs for s in split_sentences(p)] for paragraphs in documents]
    total = sum(sum(map(len, sentences)) * text.weight for sentences, text in zip(files, texts, strict=True))
    sample = []
    for sentences, text in zip(files, texts, strict=True):
        for sentence in sentences:
            copies, rest = divmod(characters / total * text.weight, 1.0)
            sample += [sentence] * (int(copies) + (draw.random() < rest))
    # Label words are added 150 times, so that the trainer makes one piece of each rather than several. They stand in
    # running text, since a piece in a sentence begins with a space.
    for _ in range(150):
        words = draw.sample(WORDS["label words"], len(WORDS["label words"]))
        sample += [" ".join(words), ": ".join(words[:40]) + ":"]
    draw.shuffle(sample)
    return sample

"""Pre-training data: a function of (seed, batch), exact spans, bounded shapes; and the tokenizer's vocabulary."""

from __future__ import annotations

import gzip
import hashlib
import lzma
from pathlib import Path
from random import Random

import numpy as np
import pytest

import softprompt_jax
from softprompt_jax.config import UserError, parse
from softprompt_jax.pretraining import phrases
from softprompt_jax.pretraining.corpus import TextFile, read_documents, split_sentences, tokenize_file
from softprompt_jax.pretraining.data import OBJECTIVES, Pretraining, PretrainingData
from softprompt_jax.pretraining.instructions import TASKS
from softprompt_jax.pretraining.lexicon import Lexicon, parse_entry, read_lexicon
from softprompt_jax.pretraining.objectives import Library, _mask
from softprompt_jax.pretraining.opinions import compose
from softprompt_jax.pretraining.vocabulary import train_tokenizer

EMBEDDED = Path(softprompt_jax.__file__).parent / "embedded"
EOS = 1
STORY = """The good king of the small country was happy because his people loved the wonderful garden, and they said so.
The terrible winter, which was the worst anyone had seen, brought disease and misery to every house in the town.
When did the old soldier come back from the long war with only 3 coins in his pocket? Nobody knew the answer.
She gave him bread, water and a warm bed, and in the morning he thanked her for the excellent kindness of the night.
A stranger asked the way to the river, and the boy who kept the sheep pointed to the dark hill behind the mill.
It was an awful and cruel crime. They were very happy to hear the great news. The horse and the horse met a horse."""
DICTIONARY = """thing: a separate and self-contained entity; "how could you do such a thing?".
kindness, benignity: a kind act.
wonderful, fantastic: extraordinarily good or great.
horrible, awful: provoking horror; "an awful automobile accident".
couch, sofa: a piece of furniture for two or more people."""
GOOD = ["good", "happy", "loved", "wonderful", "excellent", "great", "kindness", "thanked"]
BAD = ["terrible", "worst", "disease", "misery", "awful", "cruel", "crime", "horrible"]
LEXICON = Lexicon(
    {word: 3.0 if word in GOOD else -3.0 for word in GOOD + BAD},
    adjectives=["good", "happy", "wonderful", "excellent", "great", "terrible", "awful", "cruel", "horrible"],
)
MIXTURE = dict.fromkeys(("span_corruption", "short_spans", "copy", "word_order", "prefix_lm", "instructions"), 1.0)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    paragraphs = STORY.splitlines()
    (tmp_path / "story.txt").write_text("\n".join(paragraphs[:3]) + "\n\n" + "\n".join(paragraphs[3:]) + "\n")
    with lzma.open(tmp_path / "words.txt.xz", "wt") as file:
        file.write("\n\n".join(DICTIONARY.splitlines()))
    with gzip.open(tmp_path / "more.txt.gz", "wt") as file:
        file.write("\n".join(reversed(paragraphs)))
    return tmp_path


def settings(folder: Path, **changes) -> Pretraining:
    files = [
        {"path": "story.txt", "kind": "story", "weight": 2},
        {"path": "more.txt.gz", "kind": "news"},
        {"path": "words.txt.xz", "kind": "dictionary", "form": "dictionary"},
    ]
    values = {"texts_folder": str(folder), "texts": files, "max_input_tokens": 64, "max_target_tokens": 32}
    values["shapes"] = [(32, 4), (64, 16)]
    values["stages"] = [{"until": 0.5, "objectives": {"copy": 1}}, {"until": 1.0, "objectives": MIXTURE}]
    return parse(Pretraining, values | changes, "data")


def data(folder: Path, seed: int = 0, **changes) -> PretrainingData:
    return PretrainingData(settings(folder, **changes), EMBEDDED, 4, seed, total_batches=96, lexicon=LEXICON)


def library(folder: Path, **changes) -> Library:
    return data(folder, **changes).library


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_a_batch_is_a_function_of_seed_and_number(texts):
    first, second = data(texts), data(texts)
    forward = [first.batch(i) for i in range(len(first))]
    backward = [second.batch(i) for i in reversed(range(len(second)))][::-1]
    assert all(map(same, forward, backward))
    assert not same(data(texts, seed=1).batch(0), forward[0])
    with pytest.raises(IndexError):
        first.batch(96)


def test_shapes_are_bounded_and_every_target_ends_with_eos(texts):
    source = data(texts)
    assert source.shapes == [(32, 4), (64, 16), (64, 32)]
    for i in range(len(source)):
        batch = source.batch(i)
        inputs, shifted, targets = (batch[k] for k in ("encoder_tokens", "decoder_inputs", "decoder_targets"))
        assert (inputs.shape[1], targets.shape[1]) in source.shapes
        assert all(array.dtype == np.int32 and len(array) == 4 for array in batch.values())
        assert (shifted[:, 0] == 0).all()
        assert np.array_equal(shifted[:, 1:], targets[:, :-1])
        for tokens in (inputs, targets):
            for row in tokens:
                length = int((row != 0).sum())
                assert row[length - 1] == EOS
                assert not row[length:].any()
                assert (row[: length - 1] != EOS).all()
                assert length >= 2


def test_stages_follow_the_share_of_the_run(texts):
    source = data(texts)
    assert {name for name, _ in source.examples(0)} == {"copy"}
    assert {name for name, _ in source.examples(2)} == set(MIXTURE)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("name", ["span_corruption", "short_spans"])
def test_masked_spans_put_back_give_the_text(texts, name, final):
    books = library(texts, final_sentinel=final)
    everything = [text.tokens.tolist() for text in books.texts]
    draw, masked, made = Random(0), 0, 0
    for _ in range(60):
        example = OBJECTIVES[name](draw, books)
        if example is None:
            continue
        made += 1
        inputs, targets = example
        sentinels = [id_ for id_ in inputs if id_ >= 8000]
        assert sentinels == list(range(8099, 8099 - len(sentinels), -1))
        assert [id_ for id_ in targets if id_ >= 8000] == sentinels + [8099 - len(sentinels)] * final
        spans, at = {}, 0
        for id_ in targets:
            if id_ >= 8000:
                at = id_
                spans[at] = []
            else:
                spans[at].append(id_)
        whole = [piece for id_ in inputs for piece in spans.get(id_, [id_])]
        assert any(whole == tokens[k : k + len(whole)] for tokens in everything for k in range(len(tokens)))
        masked += sum(map(len, spans.values())) / len(whole)
    if name == "span_corruption":
        assert 0.12 < masked / made < 0.18


@pytest.mark.parametrize("final", [True, False])
def test_a_long_passage_has_no_more_spans_than_there_are_sentinels(texts, final):
    books = library(texts, final_sentinel=final)
    ids = [7] * 900
    inputs, targets = _mask(books, ids, [3] * 300)
    assert min(targets + inputs) == 7
    assert len([id_ for id_ in inputs if id_ >= 8000]) == 100 - final
    assert min(id_ for id_ in targets if id_ >= 8000) == 8000
    assert inputs.count(7) + targets.count(7) == len(ids)


def test_copy_answers_stand_in_the_input(texts):
    books, draw = library(texts), Random(1)
    for _ in range(50):
        inputs, targets = OBJECTIVES["copy"](draw, books)
        text = [id_ for id_ in inputs if id_ < 8000]
        assert any(text[k : k + len(targets)] == targets for k in range(len(text)))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_instruction_tasks_answer_both_ways_and_fit(texts, name):
    books, draw = library(texts), Random(2)
    made = [example for example in (TASKS[name](draw, books) for _ in range(300)) if example is not None]
    assert phrases.WEIGHTS[name] > 0
    assert len(made) >= 20
    assert all(inputs and targets and max(inputs + targets) < 8100 for inputs, targets in made)
    assert len({tuple(targets) for _, targets in made}) >= 2
    assert max(len(inputs) for inputs, _ in made) < 150


# Digests of the examples that a seed draws. If one changes, every pre-training run sees other examples than before.
DRAWN = {
    "span_corruption": "a92bacf76d870381",
    "short_spans": "80160bb226733c83",
    "copy": "92e8cf1e63747f51",
    "word_order": "09af9ecf39efcf45",
    "prefix_lm": "0e6460939a2aebe6",
    "instructions": "38e33972c8ef4919",
    "which_word": "e07ad2ca6aa86f53",
    "neighbour": "50da3e0d4fb1e69f",
    "contains": "8dad4ba029accfe5",
    "count": "fc539106dae5206a",
    "length": "e5be107a130e30a6",
    "question_or_statement": "61a88acc5a8f8407",
    "surface": "ca415868e2098a18",
    "kind_of_text": "8ff4db6eff3af136",
    "same_meaning": "1077e0a39078ca68",
    "right_order": "abee8124d007c91b",
    "follows": "40ac2771687e0d17",
    "broken": "903eaef0e3625677",
    "define": "619c772a8e7d2a7d",
    "is_definition": "18e78ee1b35cc98d",
    "synonym": "6d46fd80eed75e35",
    "sentiment_sentence": "c150c6d85e850b95",
    "sentiment_composed": "7c387e5dc5951e00",
    "sentiment_word": "526a55ffb1c8229b",
    "sentiment_gloss": "c6c6d4c7e60a926f",
    "better": "b4521ca1c5064a6c",
    "same_sentiment": "0033794c3b374457",
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_seed_draws_the_same_examples_as_ever(texts, name):
    books, draw = library(texts), Random(f"digest {name}")
    drawn = [OBJECTIVES[name](draw, books) for _ in range(2000)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == DRAWN[name]


def test_every_list_of_phrases_is_drawn_from():
    source = "".join(path.read_text() for path in Path(phrases.__file__).parent.glob("*.py")).replace("'", '"')
    for name in [*phrases.WORDS, *phrases.QUESTIONS]:
        assert f'"{name.removeprefix("good ").removeprefix("bad ")}"' in source


def test_ids_joined_are_the_ids_of_the_joined_text(texts):
    books = library(texts)
    text = books.texts[0]
    sentences = [text.tokens[a:b].tolist() for a, b in zip(text.sentences, text.sentences[1:], strict=False)]
    joined = books.encoder.decode([id_ for ids in sentences for id_ in ids])
    assert books.encoder.encode(joined) == text.tokens.tolist()
    assert joined == " ".join(STORY.split())
    assert books.words(books.encode("two words."))[0] == books.encode("two")


def test_opinions_have_the_polarity_they_were_made_for():
    draw = Random(3)
    plain = [compose(draw, LEXICON, good).lower() for good in (True, False) for _ in range(200)]
    assert len(set(plain)) > 300
    signs = [LEXICON.clear_valence(text) for text in plain]
    agree = sum(s > 0 for s in signs[:200]) + sum(s < 0 for s in signs[200:])
    against = sum(s < 0 for s in signs[:200]) + sum(s > 0 for s in signs[200:])
    assert agree > 10 * against


def test_valence_is_clear_or_zero():
    assert LEXICON.clear_valence("A good and happy day.") > 0
    assert LEXICON.clear_valence("A terrible, awful day.") < 0
    assert LEXICON.clear_valence("It was not good, nor happy.") < 0
    assert LEXICON.clear_valence("A good day and an awful night.") == 0
    assert LEXICON.clear_valence("It was a good meal, but the night was terrible, awful and cruel.") < 0
    assert LEXICON.clear_valence("A day.") == 0


def test_lexicons_that_disagree_leave_the_word_out():
    pattern = "\n".join(
        f'<word form="{form}" wordnet_id="x" pos="JJ" sense="s" polarity="{value}" />'
        for form, value in (("good", 0.7), ("curious", -0.5), ("plain", 0.0), ("dull", -0.3))
    )
    lexicon = read_lexicon(pattern, "good\t3\ncurious\t1\nhates\t-3\ncan't stand\t-3\n")
    assert lexicon.valence == {"good": 3.25, "hates": -3.0, "dull": -1.5}
    assert lexicon.adjectives == {"good": 3.25, "dull": -1.5}


def test_dictionary_entries_lose_their_examples():
    entries = [parse_entry(line) for line in DICTIONARY.splitlines()]
    assert entries[0] == (["thing"], "a separate and self-contained entity")
    assert entries[3] == (["horrible", "awful"], "provoking horror")
    assert parse_entry("no gloss here") == ([], "")


def test_sentences_end_where_they_should():
    text = 'Mr. Smith came at 3. "Go away!" he said. J. F. Kennedy laughed... Why? Because.'
    assert split_sentences(text) == [
        "Mr. Smith came at 3.",
        '"Go away!" he said.',
        "J. F. Kennedy laughed...",
        "Why?",
        "Because.",
    ]
    assert " ".join(split_sentences(STORY.replace("\n", " "))) == STORY.replace("\n", " ")


def test_documents_are_read_plain_and_compressed(texts):
    assert [len(document) for document in read_documents(texts / "story.txt")] == [3, 3]
    assert len(list(read_documents(texts / "words.txt.xz"))) == 5
    assert list(read_documents(texts / "more.txt.gz")) == [STORY.splitlines()[::-1]]


def test_text_with_a_benchmarks_canary_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A story.\n\nBENCHMARK DATA. canary GUID 26b5c67b\n")
    with pytest.raises(UserError, match=r"text.txt: holds a benchmark's canary") as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)


def test_tokens_are_computed_once(texts):
    data(texts)
    files = sorted((texts / "cache" / "texts").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    data(texts)
    assert len(files) == 3
    assert [file.stat().st_mtime_ns for file in files] == times
    (texts / "story.txt").write_text("Another text altogether.\n")
    data(texts, stages=[{"until": 1, "objectives": {"prefix_lm": 1}}])
    assert len(list((texts / "cache" / "texts").iterdir())) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": [{"until": 1, "objectives": {"span_corupton": 1}}]}, "span_corruption"),
        ({"stages": [{"until": 0.5, "objectives": {"copy": 1}}]}, "ascending"),
        ({"stages": [{"until": 1, "objectives": {"copy": 0}}]}, "greater than 0"),
        ({"texts": [{"path": "none.txt"}]}, "none.txt"),
    ],
)
def test_bad_settings_are_told_in_one_line(texts, changes, said):
    with pytest.raises(UserError, match=said) as error:
        data(texts, **changes)
    assert "\n" not in str(error.value)


def test_an_objective_the_texts_do_not_suit_is_an_error(texts):
    (texts / "short.txt").write_text("No.\n")
    source = data(
        texts,
        texts=[{"path": "short.txt"}],
        stages=[{"until": 1, "objectives": {"span_corruption": 1}}],
    )
    with pytest.raises(UserError, match="span_corruption"):
        source.batch(0)


@pytest.mark.usefixtures("own_cache")
def test_a_vocabulary_of_more_pieces_than_are_kept_is_one_line(texts, monkeypatch):
    monkeypatch.setattr("sentencepiece.SentencePieceProcessor.vocab_size", lambda self: 250_100)
    model = EMBEDDED / "spiece.model"
    with pytest.raises(UserError, match=r"spiece.model: 250100 pieces; expected at most 65,536"):
        tokenize_file(TextFile(path=str(texts / "story.txt")), model, Lexicon({}))


def test_trained_vocabulary_numbers_its_sentinels_as_t5(tmp_path, texts):
    import sentencepiece
    from transformers import T5Tokenizer

    files = [TextFile(path=str(texts / "story.txt"))]
    folder = train_tokenizer(files, tmp_path / "vocabulary", size=220, characters=20_000)
    theirs = T5Tokenizer.from_pretrained(folder)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert (ours.pad_id(), ours.eos_id(), ours.unk_id(), ours.bos_id()) == (0, 1, 2, -1)
    assert len(ours) == 220
    assert len(theirs) == 320
    assert theirs.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>", "<pad>", "</s>"]) == [319, 220, 0, 1]
    again = train_tokenizer(files, tmp_path / "again", size=220, characters=20_000)
    assert (again / "spiece.model").read_bytes() == (folder / "spiece.model").read_bytes()


def test_transformers_and_sentencepiece_agree_on_the_embedded_vocabulary():
    import sentencepiece
    from transformers import T5Tokenizer

    theirs = T5Tokenizer.from_pretrained(EMBEDDED)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(EMBEDDED / "spiece.model"))
    draw = Random(0)
    odd = [
        "😀",
        "👍🏽",
        "❤️",
        "🇬🇧",
        "👨‍👩‍👧",
        "🤷‍♂️",
        "  ",
        "\t",
        "\u3000",
        "\u00a0",
        "日本語",
        "Привет",
        "שלום",
        "ไทย",
        "한국어",
    ]
    odd += [
        "ﬁ",
        "½",
        "…",
        "\u200b",
        "e\u0301",
        "①",
        "™",
        "ß",
        "²",
        "\n",
        "▁",
        "~",
        "{",
        "\x07",
        "\ufeff",
        "don’t",
        "£5",
    ]
    words = STORY.split() + DICTIONARY.split()
    lines = []
    for _ in range(2000):
        parts = draw.choices(words, k=draw.randint(1, 12)) + draw.choices(odd, k=draw.randint(0, 4))
        draw.shuffle(parts)
        lines.append("".join(part + draw.choice((" ", " ", "", "  ")) for part in parts))
    assert theirs(lines, add_special_tokens=False)["input_ids"] == ours.encode(lines)

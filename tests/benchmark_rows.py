"""Rows of our own in the schemas of the benchmarks, and the texts T5's preprocessors make of them (prefix included)."""

from __future__ import annotations

from typing import Any

HIGHLIGHTS = "\n@highlight\n".join(
    ["The kiln stood by the river.", 'It was "old"', "Josef Brandt built it", "No one lit it!"]
)
HIGHLIGHTS_AS_TEXT = 'The kiln stood by the river. It was "old" Josef Brandt built it. No one lit it!'
RECORD = {
    "passage": HIGHLIGHTS,
    "query": "@placeholder had the bricks brought by boat.",
    "entities": ["Josef Brandt", "Brandt"],
    "entity_spans": {"text": ["Josef Brandt"], "start": [54], "end": [66]},
    "answers": ["Josef Brandt", "Brandt"],
    "idx": {"passage": 4, "query": 9},
}
RECORD_INPUT = (
    "record query: @placeholder had the bricks brought by boat. entities: Josef Brandt, Brandt passage: "
    + HIGHLIGHTS_AS_TEXT
)
WSC = {
    "text": "Anna thanked the old baker , because she had kept a loaf .",
    "span1_index": 2,
    "span1_text": "the old baker",
    "span2_index": 7,
    "span2_text": "she",
    "idx": 3,
    "label": 1,
}
WSC_INPUT = "wsc: Anna thanked the old baker , because *she* had kept a loaf ."
DPR = {
    "sentence": "The oven heats slowly, so she asked the baker to light it. She let it burn.",
    "candidates": ["the oven", "the baker"],
    "label": 0,
}
DPR_INPUT = "wsc: The oven heats slowly, so she asked the baker to light *it*. She let it burn."
SQUAD = {
    "id": "a1",
    "title": "Kilns",
    "context": "Brandt's kiln  (1874) cost $90.\nIt burned twice.",
    "question": "What did the kiln cost?",
    "answers": {"text": ["$90", "90"], "answer_start": [27, 28]},
}
SQUAD_INPUT = "question: What did the kiln cost ? context: Brandt ' s kiln ( 1874 ) cost $ 90 . It burned twice . "
MRQA = {
    "subset": "DROP",
    "context": SQUAD["context"],
    "qid": "q",
    "question": SQUAD["question"],
    "answers": ["$90", "90"],
    "detected_answers": {"text": ["$90"]},
}
PAIR = {"sentence1": "The ferry is late.", "sentence2": "The ferry has not come.", "idx": 7}
PREMISE = {"premise": "The ferry is late.", "hypothesis": "No ferry is here.", "idx": 5}
QUESTIONS = {"question1": "How old is the ferry?", "question2": "What age has the ferry?", "idx": 2}
PREMISE_TEXT = "hypothesis: No ferry is here. premise: The ferry is late."
PAIR_TEXT = "sentence1: The ferry is late. sentence2: The ferry has not come."

# Task, split, row, and per example: input with the prefix, target, answers, group.
Golden = tuple[str, str, dict[str, Any], list[tuple[str, str, tuple[str, ...], Any]]]
GOLDEN: list[Golden] = [
    (
        "boolq",
        "validation",
        {"question": "is the mill open", "passage": "The mill opens at six.", "idx": 0, "label": 1},
        [("boolq passage: The mill opens at six. question: is the mill open", "True", (), None)],
    ),
    ("cb", "train", PREMISE | {"label": 1}, [("cb " + PREMISE_TEXT, "contradiction", (), None)]),
    (
        "copa",
        "train",
        {
            "premise": "It froze.",
            "choice1": "Ice came.",
            "choice2": "He ran.",
            "question": "effect",
            "idx": 1,
            "label": 0,
        },
        [("copa choice1: Ice came. choice2: He ran. premise: It froze. question: effect", "choice1", (), None)],
    ),
    (
        "multirc",
        "validation",
        {
            "paragraph": "<b>Sent 1: </b>Ina rowed.<br><b>Sent 2: </b>Udo slept.<br>",
            "question": "Who <b>rowed</b>?",
            "answer": "Ina",
            "idx": {"paragraph": 2, "question": 11, "answer": 40},
            "label": 1,
        },
        [
            (
                "multirc question: Who rowed? answer: Ina paragraph: Sent 1: Ina rowed. Sent 2: Udo slept. ",
                "True",
                (),
                (2, 11),
            )
        ],
    ),
    (
        "record",
        "train",
        RECORD,
        [(RECORD_INPUT, answer, ("Josef Brandt", "Brandt"), None) for answer in ("Josef Brandt", "Brandt")],
    ),
    ("record", "validation", RECORD, [(RECORD_INPUT, "Josef Brandt", ("Josef Brandt", "Brandt"), None)]),
    ("rte", "train", PREMISE | {"label": 0}, [("rte " + PREMISE_TEXT, "entailment", (), None)]),
    (
        "wic",
        "train",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank closed.", "idx": 0, "label": 0}
        | {"start1": 8, "start2": 4, "end1": 12, "end2": 8},
        [("wic sentence1: A river bank. sentence2: The bank closed. word: bank", "False", (), None)],
    ),
    ("wsc", "train", WSC, [(WSC_INPUT, "the old baker", ("True",), None)]),
    ("wsc", "train", WSC | {"label": 0}, []),
    ("wsc", "validation", WSC | {"label": 0}, [(WSC_INPUT, "the old baker", ("False",), None)]),
    ("dpr", "train", DPR | {"pronoun": "it"}, [(DPR_INPUT, "the oven", (), None)]),
    ("dpr", "train", DPR | {"pronoun": "The oven"}, [("wsc: " + DPR["sentence"], "the oven", (), None)]),
    (
        "axb",
        "test",
        PAIR | {"label": 1},
        [
            (
                "rte hypothesis: The ferry has not come. premise: The ferry is late.",
                "not_entailment",
                (),
                None,
            )
        ],
    ),
    ("axg", "test", PREMISE | {"label": 0}, [("rte " + PREMISE_TEXT, "entailment", (), (2,))]),
    (
        "cola",
        "train",
        {"sentence": "Ferry the late.", "label": 0, "idx": 0},
        [("cola sentence: Ferry the late.", "unacceptable", (), None)],
    ),
    (
        "sst2",
        "train",
        {"sentence": "a warm film", "label": 1, "idx": 0},
        [("sst2 sentence: a warm film", "positive", (), None)],
    ),
    ("mrpc", "train", PAIR | {"label": 1}, [("mrpc " + PAIR_TEXT, "equivalent", (), None)]),
    ("mrpc_from_qqp", "validation", PAIR | {"label": 1}, [("mrpc " + PAIR_TEXT, "duplicate", (), None)]),
    (
        "qqp",
        "train",
        QUESTIONS | {"label": 0},
        [("qqp question1: How old is the ferry? question2: What age has the ferry?", "not_duplicate", (), None)],
    ),
    (
        "qqp_from_mrpc",
        "validation",
        QUESTIONS | {"label": 0},
        [("qqp question1: How old is the ferry? question2: What age has the ferry?", "not_equivalent", (), None)],
    ),
    *[
        ("stsb", "train", PAIR | {"label": score}, [("stsb " + PAIR_TEXT, text, (), None)])
        for score, text in ((0.0, "0.0"), (1.25, "1.2"), (2.9, "2.8"), (3.1, "3.2"), (4.75, "4.8"), (5.0, "5.0"))
    ],
    ("mnli", "validation", PREMISE | {"label": 1}, [("mnli " + PREMISE_TEXT, "neutral", (), None)]),
    ("mnli_mismatched", "validation", PREMISE | {"label": 2}, [("mnli " + PREMISE_TEXT, "contradiction", (), None)]),
    ("ax", "validation", PREMISE | {"label": 2}, [("mnli " + PREMISE_TEXT, "contradiction", (), None)]),
    (
        "qnli",
        "train",
        {"question": "Who rowed?", "sentence": "Ina rowed.", "label": 0, "idx": 0},
        [("qnli question: Who rowed? sentence: Ina rowed.", "entailment", (), None)],
    ),
    ("glue_rte", "train", PAIR | {"label": 1}, [("rte " + PAIR_TEXT, "not_entailment", (), None)]),
    ("wnli", "train", PAIR | {"label": 1}, [("wnli " + PAIR_TEXT, "entailment", (), None)]),
    ("squad", "validation", SQUAD, [(SQUAD_INPUT, " $ 90", (" $ 90", "90"), None)]),
    ("mrqa_drop", "test", MRQA, [(SQUAD_INPUT, " $ 90", (" $ 90", "90"), None)]),
    ("mrqa_race", "test", MRQA, []),
    (
        "cnn_dailymail",
        "train",
        {"article": "Ina rowed .", "highlights": "She rowed .", "id": "x"},
        [("summarize: Ina rowed .", "She rowed .", (), None)],
    ),
    (
        "xsum",
        "train",
        {"document": "Ina rowed.", "summary": "She rowed.", "id": "x"},
        [("summarize: Ina rowed.", "She rowed.", (), None)],
    ),
    (
        "wmt14_en_de",
        "train",
        {"translation": {"de": "Die Fähre kommt.", "en": "The ferry comes."}},
        [("translate English to German: The ferry comes.", "Die Fähre kommt.", (), None)],
    ),
    (
        "wmt16_ro_en",
        "train",
        {"translation": {"ro": "Vine bacul.", "en": "The ferry comes."}},
        [("translate Romanian to English: Vine bacul.", "The ferry comes.", (), None)],
    ),
    ("snli", "train", PREMISE | {"label": 2}, [("snli " + PREMISE_TEXT, "contradiction", (), None)]),
    ("snli", "train", PREMISE | {"label": -1}, []),
    (
        "docnli",
        "train",
        PREMISE | {"label": "not_entailment"},
        [("docnli " + PREMISE_TEXT, "not_entailment", (), None)],
    ),
    ("squad_dev", "validation", SQUAD, [(SQUAD_INPUT, " $ 90", (" $ 90", "90"), None)]),
    (
        "anli_r2",
        "train",
        {"uid": "u", "premise": "The  ferry is late. ", "hypothesis": "No ferry.", "label": 0, "reason": ""},
        [("anli_r2 hypothesis: No ferry. context: The ferry is late. ", "entailment", (), None)],
    ),
]

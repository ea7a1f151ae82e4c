"""A module that registers seqio Tasks of every kind, as a text to be filled in and written to a file."""

NAME = "softprompt_seqio_tasks"
MODULE = """
import json

import flax
import numpy as np
import seqio
import tensorflow as tf
from {parts} import words

FILES = {files!r}


def features(vocabulary):
    return {{side: seqio.Feature(vocabulary, add_eos=True) for side in ("inputs", "targets")}}


def rows(split, shuffle_files=False, seed=None):
    lines = [json.loads(line) for line in open(FILES[split])]
    return tf.data.Dataset.from_tensor_slices({{name: [line[name] for line in lines] for name in ("text", "label")}})


def endless_rows(split, shuffle_files=False, seed=None):
    return rows(split).repeat() if split == "train" else rows(split)


@seqio.map_over_dataset
def ask(row):
    return {{"inputs": row["text"], "targets": row["label"], "words": tf.strings.length(row["text"])}}


@seqio.map_over_dataset
def double(row):
    return {{**row, "inputs": tf.concat([row["inputs"], row["inputs"]], 0)}}


@seqio.map_over_dataset(num_seeds=1)
def draw(row, seed):
    number = tf.random.stateless_uniform([], seed, 0, 90, tf.int32)
    return {{**row, "inputs": tf.concat([[number + 3], row["inputs"]], 0)}}


def read(text, example=None, is_target=False):
    assert example["words"] > 0
    return text.upper()


def right(targets, predictions):
    assert all(target in ("YES", "NO") for target in targets)
    return {{"right": 100 * sum(t == p for t, p in zip(targets, predictions)) / len(targets)}}


def likely(targets, scores):
    return {{"likely": sum(scores) / len(scores), "count_of_scores": seqio.metrics.Scalar(len(scores))}}


def aux(targets, predictions, aux_values):
    assert list(aux_values) == ["scores"]
    sure = aux_values["scores"][[target == guess for target, guess in zip(targets, predictions)]]
    return {{"mean_score": np.mean(aux_values["scores"]), "sure": sure.sum(), "note": seqio.metrics.Text("no number")}}


OUTPUT = seqio.metrics.ModelOutputType


@flax.struct.dataclass
class Tokens(seqio.metrics.Metric):  # one that counts by itself, of token ids
    model_output_type: OUTPUT = OUTPUT.PREDICTION
    ended: float = 0.0

    @classmethod
    def from_model_output(cls, inputs, model_output, features, target_field_name="targets", mask=None, indices_2d=None):
        assert all("weights" in row for row in inputs)
        return cls(ended=float((model_output == features["targets"].vocabulary.eos_id).any(-1).mean()))

    def compute(self):
        return {{"ended": self.ended}}


class Weighted(seqio.metrics.CollectingMetric):  # one that collects
    model_output_type = OUTPUT.SCORE

    def actual_compute(self, rows, features, target_field_name="targets", cached_targets=None):
        scores = self.values["model_output"]
        weights = np.array([row["weights"].sum() for row in rows])
        targets = [read(features["targets"].vocabulary.decode(list(row["targets"])), row) for row in rows]
        return {{"weighted": (scores * weights).sum() / weights.sum()}}, {{"targets": targets, "score": scores}}


@flax.struct.dataclass
class Layers(seqio.metrics.Metric):
    model_output_type: OUTPUT = OUTPUT.SCORE_WITH_INTERMEDIATES


@seqio.map_over_dataset
def weigh(row):
    return {{**row, "weights": tf.cast(row["inputs"][:2], tf.float32)}}


def weighed(vocabulary):
    weights = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32)
    return {{**features(vocabulary), "weights": weights}}


def only_targets(vocabulary):
    return {{"targets": seqio.Feature(vocabulary)}}


SPLITS = ["train", "validation", "test"]
OBJECTS = [Tokens, Weighted, seqio.metrics.LegacyMetric.empty(right, read)]
SOURCE = seqio.FunctionDataSource(rows, splits=SPLITS)
OWN = seqio.SentencePieceVocabulary({own!r}, 100)
END = seqio.preprocessors.append_eos_after_trim
TOKENS = [ask, seqio.preprocessors.tokenize]
for name, steps, vocabulary, functions in [
    ("moods", [*TOKENS, END], OWN, [right, likely]),
    ("doubled", [*TOKENS, double, END], OWN, []),
    ("endless", [*TOKENS, END], OWN, [right]),
    ("everywhere", [lambda rows: rows.repeat(), *TOKENS, END], OWN, []),
    ("drawn", [*TOKENS, draw, END], OWN, []),
    ("broken", [*TOKENS, seqio.map_over_dataset(lambda row: {{**row, "inputs": row["none"]}})], OWN, []),
    ("of_another", [*TOKENS, END], seqio.SentencePieceVocabulary({other!r}), []),
    ("of_bytes", [*TOKENS, END], seqio.ByteVocabulary(), []),
    ("with_aux", [*TOKENS, END], OWN, [right, aux]),
    ("with_objects", [*TOKENS, weigh, END], OWN, [likely]),
    ("with_layers", [*TOKENS, END], OWN, []),
    ("twice", [*TOKENS, END], OWN, [right, right]),
    ("one_sided", [*TOKENS, END], OWN, []),
    ("cached", [*TOKENS, seqio.CacheDatasetPlaceholder(required=True), END], OWN, []),
]:
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(endless_rows, splits=SPLITS) if name == "endless" else SOURCE,
        preprocessors=steps,
        output_features={{"with_objects": weighed, "one_sided": only_targets}}.get(name, features)(vocabulary),
        metric_fns=functions,
        metric_objs={{"with_objects": OBJECTS, "with_layers": [Layers]}}.get(name),
        postprocess_fn=read if functions else None,
    )
seqio.MixtureRegistry.add("both", [("moods", 3), ("doubled", lambda task: 1)])
"""

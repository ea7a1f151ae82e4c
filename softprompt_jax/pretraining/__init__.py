"""The examples that our own T5s are pre-trained on: made up from public texts and a dictionary, as many as wanted.

`data` lists the objectives and draws examples of them. `objectives` has those on plain text, `instructions` those that
ask something; `polarity` and `opinions` are parts of these, and `phrases.yaml` has their words. `corpus` reads the
texts, `lexicon` word lists; `vocabulary` trains a tokenizer. No task that users train on is here. Begin with `data.py`.
"""

"""The text generator behind our own T5s: tasks made of dictionaries and public texts.

`data` draws examples of all objectives; `objectives`, `instructions`, `opinions`, `polarity` and `definitions` make
them from `corpus` and `lexicon`; `vocabulary` trains a tokenizer. No task that users train on is here.
Begin with `data.py`."""

"""The text generator behind our own T5s: tasks made of dictionaries and public texts.

`data` lists all objectives and draws examples of them; `objectives` are those on plain text, `instructions` lists those
that ask something (`definitions`, `polarity`), made with `questions` from `corpus`, `lexicon` and `opinions`.
`vocabulary` trains a tokenizer. No task that users train on is here. Begin with `data.py`.
"""

"""One file a family of models: from its `config.json` to settings and back, and the names of its tensors.

Knows no files on disk: `checkpoints/` opens them and asks here what a name means.
"""

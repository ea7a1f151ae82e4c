"""A few examples of a large set; the same seed chooses the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pydantic

from softprompt_jax.config import Settings, UserError


class FewShot(Settings):
    """A few examples of the train split: `count` of each label word, or `count` in all if any text may be a target."""

    count: int = pydantic.Field(gt=0)  # number of examples
    seed: int = pydantic.Field(0, ge=0)  # seed of the choice

    def choose(self, targets: Sequence[str], words: Sequence[str] | None, where: str) -> list[int]:
        """Return the numbers of the chosen examples in ascending order.

        A label word with fewer than `count` examples is a UserError.
        """
        groups = {f" of {word!r}": [i for i, target in enumerate(targets) if target == word] for word in words or ()}
        groups = groups or {"": list(range(len(targets)))}
        random, chosen = np.random.Generator(np.random.PCG64(self.seed)), []
        for name, members in groups.items():
            if len(members) < self.count:
                raise UserError(
                    f"{where}: found {len(members)} examples{name}; few_shot.count expected {self.count}; lower it"
                )
            chosen += random.permutation(members)[: self.count].tolist()
        return sorted(chosen)

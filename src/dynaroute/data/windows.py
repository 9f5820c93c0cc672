"""A part of a split's windows: the same ones for every run and every evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynaroute.data.shards import Windows
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    import torch

KEYS = {"train": "train_windows", "validation": "validation_windows", "test": "eval_windows"}


class Selection:
    """Some windows of a `Windows`, and used like one: window i of it is window `indices[i]` of all."""

    def __init__(self, windows: Windows, indices: Sequence[int]) -> None:
        self.windows, self.seq_len, self.indices = windows, windows.seq_len, indices

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.indices)

    def batch(self, indices: Sequence[int]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Windows as (tokens, targets), both int64 [B, T].

        Raises:
            IndexError: there is no such window.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"window {index} of {len(self)}")
        return self.windows.batch([self.indices[index] for index in indices])


class Subset(Selection):
    """Evenly spaced windows of a split, as many as the settings ask for."""

    def __init__(self, windows: Windows, number: int | None, section: str = "dagformer") -> None:
        """Takes `number` windows, or all for None.

        Raises:
            DynarouteError: there are fewer; it names the setting, one of a section, that asks for that many.
        """
        total = len(windows)
        if number is not None and number > total:
            split, seq_len = windows.shards.split, windows.seq_len
            allowed = f"must be at most {total}, the number of windows of {seq_len} tokens in the {split} split"
            raise DynarouteError(f"{section}.{KEYS[split]} = {number}: {allowed}")
        super().__init__(windows, range(total) if number is None else [i * total // number for i in range(number)])

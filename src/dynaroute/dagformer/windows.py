"""Which windows of a split DAGFormer reads."""

from dynaroute.config.dagformer import DAGFormer
from dynaroute.data.tokens.documents import spread_windows
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset, evenly_spaced
from dynaroute.errors import DynarouteError

NUMBERS = {"train": "train_windows", "validation": "validation_windows", "test": "eval_windows"}  # settings, by split


def variant_windows(shards: TokenShards, settings: DAGFormer) -> Subset:
    """The windows of a split that variants are trained, validated or evaluated on.

    Those of the test split lie within one document each and are spread evenly over documents.

    Raises:
        DynarouteError: the split has fewer than the settings ask for.
    """
    windows, key = Windows(shards, settings.seq_len, keep_tail=False), NUMBERS[shards.split]
    if shards.split == "test":
        chosen = spread_windows(shards, settings.seq_len, settings.eval_windows)
        if len(chosen) < settings.eval_windows:
            allowed = f"must be at most {len(chosen)}, the windows of the test split that lie within one document"
            raise DynarouteError(f"params.yaml: dagformer.{key} = {settings.eval_windows}: {allowed}")
        return Subset(windows, chosen)
    return evenly_spaced(windows, getattr(settings, key), f"dagformer.{key}")

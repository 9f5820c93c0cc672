"""A predictor and the base that it wires, trained together."""

from typing import Any

from torch import Tensor, nn

from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.errors import DynarouteError
from dynaroute.training.schedules import decay_groups


class JointModel(nn.Module):
    """The parameters of both, for the loop to train and save.

    Calling it calls the predictor. The objective runs the base, through a `DagForward` made with `trainable`.
    """

    def __init__(self, predictor: StructurePredictor, base: nn.Module) -> None:
        """Raises DynarouteError if parameters of the base share memory: a checkpoint holds each tensor once."""
        super().__init__()
        names = dict(base.named_parameters(remove_duplicate=False))
        if tied := sorted(names.keys() - dict(base.named_parameters()).keys()):
            raise DynarouteError(
                f"dagformer.base: has tied embeddings ({tied[0]}): it cannot be trained jointly, so base_lr must be 0"
            )
        self.predictor, self.base = predictor, base

    def forward(self, *arguments: Any) -> Tensor:
        """The adjacency, see `StructurePredictor.forward`."""
        return self.predictor(*arguments)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the predictor, and of the base at `base_lr`; in both, only matrices decay."""
        variant = self.predictor.variant
        base = decay_groups(self.base, variant.weight_decay)
        for group in base:
            group["lr_factor"] = variant.base_lr / variant.lr
        return decay_groups(self.predictor, variant.weight_decay) + base

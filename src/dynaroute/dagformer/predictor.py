"""The structure predictor: from the vector of a text to the adjacency that wires a frozen base for that text.

It knows nothing of the base, the encoder or the training. Gates and cascade are those of `dynaroute.dagformer.gates`.

    B batch   E embedding   F predictor's hidden width   H heads   L layers   N nodes = L * H   r rank
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaroute.config.dagformer import Variant
from dynaroute.dagformer.gates import Mode, cascade, dag_mask, gumbel_sigmoid, hold_share, logistic_noise

# The standard deviation over entries of U V^T at initialisation. Every logit then starts within about 1 of init_logit:
# at 15 all gates are open, and sigmoid(15 / 5) is the same for all to 1 %.
INITIAL_SPREAD = 0.1
GELU_GAIN = 1.5335  # 1 / sqrt(E[gelu(z)^2]) for a standard normal z: keeps the mean square at 1 through a layer
STATISTICS_ROWS = 2**16  # enough for a mean and a standard deviation; more would only cost memory


class StructurePredictor(nn.Module):
    """Predicts a wiring of L layers of H heads from a text's embedding x.

        h = GELU(W2 GELU(W1 normalise(x) + b1) + b2)        [B, F]
        U = W_u h + b_u,  V = W_v h + b_v                   [B, N, r] each
        Z = U V^T + init_logit                              at valid entries, else -inf; init_logit is learnable
        A = cascade(gates of Z)                             by the variant's cascade and exempt_first_layer

    An encoder's features differ in scale by orders of magnitude, and averages over many tokens share a large common
    vector that hides the differences between texts. So x is standardised, feature by feature, with the statistics of
    the training texts (`fit_normalisation`; stored with the weights), and scaled to a mean square of 1, so that no text
    has an outlying norm, not even a short one.

    With a `target_density`, Z is shifted so that this share of each text's gates is open.

    With `predictor_input: none` a learned constant replaces the normalised x: one topology for all texts. With `edges`
    Z is learned directly, entry by entry, from init_logit on.

    All work is in the parameters' dtype, without autocast: in bf16, numbers near an init_logit of 15 lie 0.06 apart.
    """

    def __init__(self, variant: Variant, num_layers: int, num_heads: int, embedding_size: int) -> None:
        super().__init__()
        self.variant = variant
        self.num_layers, self.num_heads = num_layers, num_heads
        self.num_nodes = num_layers * num_heads
        hidden, outputs = variant.predictor_hidden, self.num_nodes * variant.rank
        self.constant = nn.Parameter(torch.randn(embedding_size)) if variant.predictor_input == "none" else None
        self.edges = None
        if variant.predictor_input == "edges":
            self.edges = nn.Parameter(torch.zeros(self.num_nodes, self.num_nodes))
        else:
            self.first = nn.Linear(embedding_size, hidden)
            self.second = nn.Linear(hidden, hidden)
            self.u, self.v = nn.Linear(hidden, outputs), nn.Linear(hidden, outputs)
        self.init_logit = nn.Parameter(torch.tensor(variant.init_logit))
        # As a logarithm, k stays positive.
        learnable = variant.cascade == "learnable"
        self.log_k = nn.Parameter(torch.tensor(math.log(variant.cascade_k))) if learnable else None
        self.register_buffer("embedding_mean", torch.zeros(embedding_size))
        self.register_buffer("embedding_inverse_std", torch.ones(embedding_size))
        self.register_buffer("invalid", ~dag_mask(num_layers, num_heads), persistent=False)
        if self.edges is None:
            self._initialise()

    def _initialise(self) -> None:
        """Normal weights, zero biases. h has a mean square of 1, so the entries of U and V have the head's std * |h|.

        An entry of U V^T is a sum of r products of independent terms of standard deviation s, and spreads by
        sqrt(r) * s^2.
        """
        entry_std = math.sqrt(INITIAL_SPREAD / math.sqrt(self.variant.rank))
        gains = {self.first: 1.0, self.second: GELU_GAIN, self.u: GELU_GAIN * entry_std, self.v: GELU_GAIN * entry_std}
        for layer, gain in gains.items():
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def fit_normalisation(self, embeddings: Tensor | np.ndarray) -> None:
        """Sets the normalisation from the training texts' embeddings, [n, E]; call it once, before training.

        A feature that does not vary over them is ignored.
        """
        rows = torch.as_tensor(embeddings[:: math.ceil(len(embeddings) / STATISTICS_ROWS)]).double()
        std, mean = torch.std_mean(rows, dim=0, correction=0)
        varies = std > 1e-6 * mean.abs()  # the resolution of float32, in which x - mean is taken
        self.embedding_mean.copy_(mean)
        self.embedding_inverse_std.copy_(torch.where(varies, 1 / std, 0))

    @property
    def cascade_k(self) -> float | Tensor:
        """The steepness of the cascade: a scalar tensor with a gradient where it is learnable."""
        return self.variant.cascade_k if self.log_k is None else self.log_k.exp()

    def logits(self, embeddings: Tensor, mode: Mode = "soft") -> Tensor:
        """Z, [B, N, N] in the parameters' dtype: -inf where an entry is not valid.

        Args:
            embeddings: [B, E] of any scale and float dtype. With `predictor_input: none` only B is read.
            mode: matters with a `target_density` alone, see `hold_share`.
        """
        with torch.autocast(self.init_logit.device.type, enabled=False):
            if self.edges is not None:
                logits = (self.init_logit + self.edges)[None]
            else:
                x = self._normalise(embeddings) if self.constant is None else self.constant[None]  # [B or 1, E]
                h = F.gelu(self.second(F.gelu(self.first(x))))  # [B or 1, F]
                u, v = (head(h).unflatten(-1, (self.num_nodes, -1)) for head in (self.u, self.v))  # [B or 1, N, r]
                logits = torch.baddbmm(self.init_logit, u, v.transpose(1, 2))
            if self.variant.target_density is not None:
                logits = hold_share(logits, ~self.invalid, self.variant.target_density, mode)
            logits = logits.masked_fill(self.invalid, -torch.inf)
        return logits.expand(len(embeddings), -1, -1)

    def _normalise(self, embeddings: Tensor) -> Tensor:
        x = (embeddings.to(self.embedding_mean) - self.embedding_mean) * self.embedding_inverse_std
        return F.rms_norm(x, x.shape[-1:])

    def gates(self, embeddings: Tensor, tau: float | Tensor, mode: Mode, noise: Tensor | None = None) -> Tensor:
        """The gates before the cascade, [B, N, N]; arguments and errors are those of `forward`."""
        return gumbel_sigmoid(self.logits(embeddings, mode), tau, mode, noise, self.variant.gates)

    def forward(self, embeddings: Tensor, tau: float | Tensor, mode: Mode, noise: Tensor | None = None) -> Tensor:
        """The adjacency A, [B, N, N], 0 where an entry is not valid.

        Args:
            embeddings: [B, E], see `logits`.
            tau: temperature of the gates.
            mode: train, soft or hard, see `gumbel_sigmoid`; hard gates are 0 or 1 and have no gradient.
            noise: [B, N, N], in mode train only, see `sequence_noise`.

        Raises:
            DynarouteError: what `gumbel_sigmoid` raises.
        """
        adjacency = self.gates(embeddings, tau, mode, noise)
        if self.variant.cascade == "off":
            return adjacency
        exempt = self.variant.exempt_first_layer
        return cascade(adjacency, self.cascade_k, self.num_heads, mode == "hard", exempt)


def sequence_noise(seed: int, step: int, windows: Tensor, num_nodes: int) -> Tensor:
    """Logistic noise for the gates of each sequence, [B, N, N] float32 on the CPU.

    Each sequence's noise depends on (seed, step, its window's index) alone: not on the others of its batch, the number
    of processes, or the device.

    Args:
        seed: of the run.
        step: the optimizer step.
        windows: [B] int64, which windows the sequences are.
        num_nodes: N.
    """
    return torch.stack([_noise(seed, step, window, num_nodes) for window in windows.tolist()])


def sequence_signs(seed: int, step: int, windows: Tensor) -> Tensor:
    """A random sign for each sequence, [B] float32 on the CPU, of -1 or 1; it depends on what `sequence_noise` does."""
    draws = [np.random.SeedSequence([seed, step, window, 1]).generate_state(1)[0] & 1 for window in windows.tolist()]
    return 1 - 2 * torch.tensor(draws, dtype=torch.float32)


def _noise(seed: int, step: int, window: int, num_nodes: int) -> Tensor:
    draw = np.random.SeedSequence([seed, step, window]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(draw >> 1))  # 63 bits: manual_seed takes a signed number
    return logistic_noise((num_nodes, num_nodes), generator)

"""Multi-token prediction: modules that look further ahead than the next token (report, section 2.2).

Module k = 1..D predicts token i+k+1 at position i, from the state of the module before it (module 0 is the main model)
and the embedding of token i+k:

    h'_i = M [norm_e(Emb(t_{i+k})) ; norm_h(h^{k-1}_i)]      eq. 21, in the order of the released weights:
    h^k  = block(h')                                         embedding first, although the report prints it second
    P    = head(norm(h^k))                                   embedding and head are the main model's

Where documents are kept apart, position i crosses a border if token i+k is another document's. These are the last k
positions of a document: they are given no target, and the mask of the main model is all that the others need, because
a position attends to earlier ones of its own document only, and none that crosses is before one that does not. A
position that does not cross at depth k does not at depth k - 1 either, so its state there is clean as well. Those that
cross are routed, and counted in the experts' load, like the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.block import TransformerBlock
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.layers.router import RouterOutput
from lightning_dsv3.ops.attention import Positions
from lightning_dsv3.ops.latent_attention import LayerCache


class MTPModule(nn.Module):
    """One module of multi-token prediction, without the embedding and head that it shares."""

    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.embedding_norm = RMSNorm(d, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(d, config.rms_norm_eps)
        self.projection = Linear(2 * d, d)
        self.block = TransformerBlock(config, dense=False)
        self.norm = RMSNorm(d, config.rms_norm_eps)

    def forward(
        self, hidden_BSD: Tensor, embedding_BSD: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, RouterOutput | None]:
        """Run the module.

        Args:
            hidden_BSD: State h^{k-1} of positions i, ``[B, S, D]``.
            embedding_BSD: Embeddings of the tokens i + k, ``[B, S, D]``.
            positions: Where the S positions i stand, and the mask between documents.
            cache: What is kept of the module's earlier positions, and will be of these.

        Returns:
            State h^k before its norm, after its norm, and the block's routing.
        """
        joined = torch.cat([self.embedding_norm(embedding_BSD), self.hidden_norm(hidden_BSD)], dim=-1)
        h_BSD, routing = self.block(self.projection(joined), positions, cache)
        return h_BSD, self.norm(h_BSD), routing

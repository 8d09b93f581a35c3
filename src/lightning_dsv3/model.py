"""DeepSeek-V3 as mathematics on one device: embedding, blocks, head, and the modules of multi-token prediction.

Nothing here knows of ranks, precision, compilation or checkpoint layouts; they act on a built model from outside.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.block import TransformerBlock
from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.layers.mtp import MTPModule
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.layers.router import Router, RouterOutput
from lightning_dsv3.ops.attention import Positions, attention_kernel
from lightning_dsv3.ops.cross_entropy import count_targets, linear_cross_entropy, mtp_targets, shifted_targets
from lightning_dsv3.ops.documents import Documents
from lightning_dsv3.ops.latent_attention import ModelCache
from lightning_dsv3.ops.rope import rope_table


@dataclass
class DeepSeekV3Output:
    """What a forward pass returns.

    Attributes:
        logits: Main head's logits ``[B, S, V]``, or None.
        loss: Cross entropy of the main head alone, mean over targets, float32 scalar; None without labels.
        token_losses: Its terms in nats, float32 ``[B, S]``: position i holds the loss of label i + 1, 0 where there is
            none. No gradient.
        mtp_logits: Logits of each MTP depth k, ``[B, S - k, V]``; position i predicts token i + k + 1.
        mtp_losses: Cross entropy of each MTP depth, float32 scalars (eq. 24); with documents, over the positions whose
            token i + k is of their own document.
        routing: What each router decided, main blocks first, then MTP modules.
        residual: State behind the last block, before the final norm, ``[B, S, D]``.
        hidden: State after the final norm, which the head reads, ``[B, S, D]``.
        mtp_hidden: State of each MTP depth k after its norm, which the head reads too, ``[B, S - k, D]``.
    """

    logits: Tensor | None
    loss: Tensor | None
    token_losses: Tensor | None
    mtp_logits: tuple[Tensor, ...]
    mtp_losses: tuple[Tensor, ...]
    routing: tuple[RouterOutput, ...]
    residual: Tensor
    hidden: Tensor
    mtp_hidden: tuple[Tensor, ...]


class DeepSeekV3(nn.Module):
    """The model.

    Args:
        config: Its shape.

    Example:
        >>> config = DeepSeekV3Config.from_preset("tiny", num_hidden_layers=2)
        >>> model = DeepSeekV3(config)
        >>> ids = torch.randint(0, config.vocab_size, (2, 16))
        >>> output = model(ids, labels=ids, return_logits=False)
        >>> output.loss.shape, len(output.mtp_losses), output.logits
        (torch.Size([]), 1, None)
    """

    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, dense=layer < config.first_k_dense_replace)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.num_nextn_predict_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw matrices from a normal distribution of ``initializer_range`` (report, section 4.2); norms 1, bias 0."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up, std=std)
                nn.init.normal_(module.down, std=std)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, Router) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        return_logits: bool = True,
        use_mtp: bool | None = None,
        document: Tensor | None = None,
        cache: ModelCache | None = None,
    ) -> DeepSeekV3Output:
        """Predict the next token at each position, and with MTP the ones behind it.

        Args:
            input_ids: Token ids, int64 ``[B, S]``.
            labels: Target ids, int64 ``[B, S]``, usually ``input_ids``; shifted inside, -100 is ignored, as in
                Hugging Face.
            return_logits: Also return logits. Without them losses are computed in chunks and no logits are kept.
            use_mtp: Run the MTP modules; None runs them when labels are given.
            document: Number of the document that each position belongs to, int64 ``[B, S]``; a row's documents follow
                one another, each with its own number. A position then attends to its own document alone (report,
                section 5.1). None: a row is one text, attention reaches over its borders (section 4.1). In both the
                last token of a document predicts the first of the next, which is the end of sentence between them.
            cache: What is kept of the tokens before these, which then follow them, and what these are kept in
                (:mod:`lightning_dsv3.inference`). The MTP modules have caches of their own and are not run with it.

        Returns:
            Logits and losses; see :class:`DeepSeekV3Output`.
        """
        config = self.config
        embedding_BSD = self.embedding(input_ids)
        positions = self._positions(embedding_BSD, document) if cache is None else cache.positions
        routing: list[RouterOutput | None] = []
        x_BSD = embedding_BSD
        for layer, block in enumerate(self.blocks):
            x_BSD, block_routing = block(x_BSD, positions, None if cache is None else cache.layer(layer))
            routing.append(block_routing)
        h_BSD = self.norm(x_BSD)

        states: list[Tensor] = []
        if use_mtp or (use_mtp is None and labels is not None):
            chained = h_BSD if config.mtp_input_state == "final_norm" else x_BSD
            for depth, module in enumerate(self.mtp, start=1):
                if input_ids.shape[1] <= depth:
                    break  # a sequence this short has no token so far ahead
                before, after, block_routing = module(
                    chained[:, :-1], embedding_BSD[:, depth:], positions.first(input_ids.shape[1] - depth)
                )
                states.append(after)
                routing.append(block_routing)
                chained = after if config.mtp_chain_state == "post_norm" else before

        loss, token_losses, mtp_losses = self._losses(h_BSD, states, labels, document)
        return DeepSeekV3Output(
            logits=self.head(h_BSD) if return_logits else None,
            loss=loss,
            token_losses=token_losses,
            mtp_logits=tuple(self.head(state) for state in states) if return_logits else (),
            mtp_losses=mtp_losses,
            routing=tuple(r for r in routing if r is not None),
            residual=x_BSD,
            hidden=h_BSD,
            mtp_hidden=tuple(states),
        )

    def _positions(self, x_BSD: Tensor, document: Tensor | None) -> Positions:
        """Return the positions of a row, the same for all blocks."""
        config = self.config
        # Scores depend on differences of positions alone, so a document inside a row needs no count of its own.
        cos, sin = rope_table(
            torch.arange(x_BSD.shape[1], device=x_BSD.device),
            dim=config.qk_rope_head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
        )
        if document is None:
            return Positions(cos, sin)
        device = x_BSD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BSD.dtype
        like = x_BSD.new_empty((), dtype=dtype)
        kernel = attention_kernel(like, qk_head_dim=config.qk_head_dim, v_head_dim=config.v_head_dim, packed=True)
        return Positions(cos, sin, Documents.prepared(document, kernel.name, dtype))

    def _losses(
        self, h_BSD: Tensor, states: list[Tensor], labels: Tensor | None, document: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """Return the main loss, its terms and the MTP losses, head by head: one chunk of logits lives at a time."""
        if labels is None:
            return None, None, ()
        targets_BS = shifted_targets(labels, 1)
        num_targets = count_targets(targets_BS)
        main = linear_cross_entropy(h_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten(), num_targets)
        mtp_losses = []
        for depth, state in enumerate(states, start=1):
            targets = mtp_targets(labels, depth, document).flatten()
            denominator = num_targets if self.config.mtp_loss_normalizer == "main" else count_targets(targets)
            mtp_losses.append(linear_cross_entropy(state.flatten(0, 1), self.head.weight, targets, denominator).loss)
        return main.loss, main.token_losses.view_as(labels), tuple(mtp_losses)

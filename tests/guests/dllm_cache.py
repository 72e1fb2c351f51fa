"""dLLM-Cache, a guest in this house: every layer recomputes the rows whose values changed most.

It cuts the canvas in two. The prompt is recomputed every `prompt_interval` steps, the response
every `response_interval`. In between, each layer computes the values of the whole response, which
is cheap, compares them with those of before, and recomputes the quarter that changed most. What
attention and MLP add to the residual stream is cached as well, so all rows run through all layers.
A policy may bring its own forward pass, so neither model.py nor d2cache.py knows of this one.

Paper: arXiv 2506.06295. Followed is the authors' code, whose outputs the tests hold. Shape letters
as in model.py; n positions are recomputed in a layer.
"""

from dataclasses import dataclass

from d2cache import highest, rows_before
from model import attend, require, rope, rotate

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F


@dataclass(eq=False)
class DLLMCache:
    """Predicts every masked position in every step. An object serves one decode at a time.

    ratio: the share of the response that each layer recomputes between two refreshes; 0: none, and
    no values either. Layer 0 always recomputes the whole response: it reads the tokens themselves.
    """

    prompt_interval: int = 8
    response_interval: int = 4
    ratio: float = 0.25
    uses_attention = False

    def __post_init__(self):
        counts = self.prompt_interval >= 1 and self.response_interval >= 1
        require(counts, f"{self} should have intervals >= 1")
        require(0 <= self.ratio <= 1, f"{self} should have a ratio from 0 to 1")
        self.cache = None  # of the decode under way

    def choose(self, state):
        """What is asked for; what is recomputed for it, every layer decides.  (B, T) bool"""
        return state.masked

    def begin(self, cache, state, C):
        """Room for what passes leave behind. The first one recomputes, and predicts, everything."""
        L, B, T = cache.k.shape[:3]
        require(state.step == 0, "a DLLMCache is in two decodes, should be in one at a time")
        self.recomputed = []
        self.cache = cache  # of k and v; beside them, of every layer and position:
        self.attended = cache.k.new_zeros(L, B, T, C)  # what attention adds to x
        self.gated = cache.k.new_zeros(L, B, T, C)  # what the MLP adds
        self.response = state.masked

    def recompute(self, model, cache, state, positions, valid, R):
        """In place of d2cache.recompute: logits (B, R, V), and no influence.

        For spectators it keeps `recomputed`, by pass, the share of layers in which each position
        was, (B, T), its values apart; and the last pass's `rows`, (L, B, T).
        """
        if cache is not self.cache:
            self.begin(cache, state, model.config.d_model)
        self.step = len(self.recomputed)
        self.rows = self.response.new_zeros(len(model.blocks), *state.tokens.shape)  # (L, B, T)
        x = model.wte(state.tokens)
        for layer in range(len(model.blocks)):
            x = self.one_layer(model, layer, x, state.padding)
        self.rows &= valid.any(dim=1, keepdim=True)  # what a finished sequence does is for nothing
        self.recomputed.append(self.rows.float().mean(dim=0))

        sequences = torch.arange(len(positions), device=positions.device)[:, None]
        hidden = x[sequences, positions]  # (B, T, C) -> (B, Q, C)
        if model.config.shifted:
            hidden = rows_before(hidden, positions, R, state.tokens.shape[1])
        return model.head(hidden[:, :R]), None

    def one_layer(self, model, layer, x, padding):
        """model.Layer where some rows are recomputed.  (B, T, C) -> (B, T, C)"""
        block = model.blocks[layer]
        h = block.attn_norm(x)
        heads = (-1, model.config.head_dim)
        v = block.v_proj(h).unflatten(-1, heads)  # (B, T, C) -> (B, T, G, D)
        rows = self.most_changed(layer, v)
        self.rows[layer] = rows
        new = rows if self.ratio == 0 else rows | self.response
        self.cache.v[layer] = v.where(new[:, :, None, None], self.cache.v[layer])

        positions = rows.nonzero()[:, 1].view(len(x), -1)  # (B, n): equally many of each sequence
        at = torch.arange(len(x), device=x.device)[:, None], positions
        cos, sin = rope(positions, model.config, torch.promote_types(x.dtype, torch.float32))
        q = rotate(block.q_proj(h[at]).unflatten(-1, heads), cos, sin)  # -> (B, n, H, D)
        self.cache.k[layer][at] = rotate(block.k_proj(h[at]).unflatten(-1, heads), cos, sin)

        read = attend(q, self.cache.k[layer], self.cache.v[layer], padding)
        self.attended[layer][at] = block.attn_out(read.flatten(2))  # (B, n, H, D) -> (B, n, C)
        x = x + self.attended[layer]
        self.gated[layer][at] = block.mlp(block.ff_norm(x[at]))
        return x + self.gated[layer]

    def most_changed(self, layer, v):
        """The rows to recompute: least cosine between v now and before, or all.  -> (B, T) bool"""
        rows = self.response
        if layer > 0 and self.step % self.response_interval > 0:
            similarity = F.cosine_similarity(v.flatten(2), self.cache.v[layer].flatten(2), dim=2)
            n = int(self.ratio * self.response[0].sum())
            rows = highest(-similarity, self.response, n)
        if self.step % self.prompt_interval == 0:
            rows = rows | ~self.response
        return rows

"""Elastic-Cache, a guest in this house: a cache that goes on deciding inside the forward pass.

d2Cache says before a pass which positions it recomputes. Elastic-Cache starts with a few, watches
in every layer how far the attention of some known positions has drifted since it was last computed,
and once it has drifted too far, recomputes everything from the next layer on. So it caches more
than keys and values: to start in a deep layer takes the residual stream that entered it. A policy
may bring its own forward pass, so neither model.py nor d2cache.py knows of this one.

Paper: arXiv 2510.14973; where it and the authors' code differ, the code is followed, whose outputs
the tests hold. Shape letters as in model.py; n counts positions of a single sequence.
"""

from dataclasses import dataclass

from d2cache import highest, rows_before
from model import attend, require, rope

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F

LEAST = 1e-4  # logits times this keep their order, at a confidence of about 1 / V


@dataclass(eq=False)
class ElasticCache:
    """Recomputes W, the first masked positions, the fresh ones, and M, where W looked most.

    width: so many positions are in W; only they are predicted. watch: so many a layer puts into M.
    gamma: refresh below this similarity. over: it is a cosine over "heads", as in the code, or over
    "keys", each row of attention by itself, as in the paper.
    Layer 0 is never refreshed, as the first test comes behind it: so no gamma makes this exact; to
    choose everything does. An object serves one decode at a time.
    """

    width: int = 16
    gamma: float = 0.9
    watch: int = 1
    over: str = "heads"
    uses_attention = False  # d2cache.py's rollout: this one looks for itself

    def __post_init__(self):
        require(self.width >= 1 and self.watch >= 1, f"{self} should have width and watch >= 1")
        require(self.over in ("heads", "keys"), f"{self} should be over 'heads' or 'keys'")
        self.cache = None  # of the decode under way
        self.watched = torch.tensor(False)  # M by the last pass: (B, T), once there was one

    def choose(self, state):
        """W, the fresh positions and M.  (B, T) bool"""
        self.masked = state.masked
        return self.window | state.fresh | self.watched

    @property
    def window(self):
        """W.  (B, T) bool"""
        return self.masked & (self.masked.cumsum(dim=1) <= self.width)

    def begin(self, config, cache, state, positions):
        """Room for what passes leave behind. The first one recomputes, and predicts, everything."""
        L, B, T = cache.k.shape[:3]
        self.cache = cache  # of k and v; beside them: the residual stream entering a layer, and q
        self.x = cache.k.new_zeros(L + 1, B, T, config.d_model)
        self.q = cache.k.new_zeros(L, B, T, config.n_heads, config.head_dim)
        self.masked = state.masked
        self.real = state.known | state.masked
        self.watched = torch.zeros_like(self.masked)
        self.recomputed = []
        require(state.step == 0, "an ElasticCache is in two decodes, should be in one at a time")

    def recompute(self, model, cache, state, positions, valid, R):
        """In place of d2cache.recompute: logits (B, R, V), and no influence.

        The first pass predicts all masked positions. Those that are not in W come last.
        For spectators it keeps `recomputed`, by pass, the share of layers in which each position
        was, (B, T); and the last pass's `rows`, (L, B, T), and `similarity`, (L, B), nan: untested.
        """
        if cache is not self.cache:
            self.begin(model.config, cache, state, positions)
        self.rows = self.real.new_zeros(len(model.blocks), *state.tokens.shape)  # (L, B, T)
        self.similarity = torch.full(self.rows.shape[:2], torch.nan)
        self.x[0] = model.wte(state.tokens)

        watched = torch.zeros_like(self.watched)
        for b in valid.any(dim=1).nonzero()[:, 0].tolist():  # each drifts by itself
            watched[b] = self.one_pass(model, b, positions[b, valid[b]])
        self.watched = watched
        self.recomputed.append(self.rows.float().mean(dim=0))

        sequences = torch.arange(len(positions), device=positions.device)[:, None]
        hidden = self.x[-1][sequences, positions]  # (B, T, C) -> (B, Q, C)
        if model.config.shifted:
            hidden = rows_before(hidden, positions, R, state.tokens.shape[1])
        logits = model.head(hidden[:, :R])
        in_window = self.window.gather(1, positions[:, :R])[:, :, None]
        return logits.where(in_window, LEAST * logits), None

    def one_pass(self, model, b, asked):
        """All layers of sequence b, from the rows asked for, (n,), on.  -> its next M, (T,) bool"""
        rows = asked
        real = self.real[b]
        known = real & ~self.masked[b]
        watched = torch.zeros_like(known)
        drifted = False
        for layer, block in enumerate(model.blocks):
            if drifted:
                others = real & ~self.rows[0, b]  # first from the x that is in the cache
                rows = torch.cat([asked, others.nonzero()[:, 0]])
            self.rows[layer, b, rows] = True

            # s = mean cos(A0, A1); from the next layer on everything is recomputed if s < gamma.
            before = self.attention(layer, b, self.watched[b])  # A0
            self.one_layer(block, layer, b, rows, model.config)
            after = self.attention(layer, b, self.watched[b])  # A1
            if not drifted:
                axis = 0 if self.over == "heads" else 2
                similarity = F.cosine_similarity(before, after, dim=axis).mean().item()
                self.similarity[layer, b] = similarity
                drifted = similarity < self.gamma  # nan as long as M is empty: no drift

            looked_at = self.attention(layer, b, self.window[b]).sum(dim=(0, 1))
            looked_at = F.pad(looked_at, (len(real) - len(looked_at), 0))  # the padding, by nobody
            watched |= highest(looked_at[None], known[None], self.watch)[0]
        return watched

    def one_layer(self, block, layer, b, rows, config):
        """model.Layer on the rows of a sequence: their x of the next layer; keeps q, k and v."""
        x = self.x[layer, b, rows][None]  # (1, n, C)
        cos, sin = rope(rows[None], config, torch.promote_types(x.dtype, torch.float32))
        q, k, v = block.queries_keys_values(x, cos, sin)
        self.q[layer, b, rows] = q[0]  # (1, n, H, D) -> (n, H, D)
        self.cache.k[layer, b, rows] = k[0]
        self.cache.v[layer, b, rows] = v[0]

        K = self.cache.k[layer, b, self.real[b]]  # (T, G, D) but for padding
        V = self.cache.v[layer, b, self.real[b]]
        self.x[layer + 1, b, rows] = block(x, attend(q, K[None], V[None]))[0]

    def attention(self, layer, b, chosen):
        """softmax(q K^T / sqrt(D)) of what is cached now, each head apart.  (T,) -> (H, n, T)"""
        q = self.q[layer, b, chosen].transpose(0, 1)  # (n, H, D) -> (H, n, D)
        k = self.cache.k[layer, b, self.real[b]]
        k = k.repeat_interleave(len(q) // k.shape[1], dim=1)  # one for each query head
        scores = q @ k.permute(1, 2, 0) / q.shape[2] ** 0.5  # -> (H, n, T)
        return torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))

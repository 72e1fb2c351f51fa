"""Controls: d2Cache with a part replaced or left out. bench.py has a row for each."""

import torch
from d2cache import D2Cache, highest, rows_before
from oldest_first import OldestFirst


class RandomStage1(D2Cache):
    """Stage 1 takes as many masked positions, but any."""

    def about_to_be_decoded(self, state):
        return highest(torch.rand_like(state.confidence), state.masked, self.k)


class WindowStage1(D2Cache):
    """Stage 1 takes as many masked positions, but the first ones of the block."""

    def about_to_be_decoded(self, state):
        to_decode = state.masked & state.block
        return to_decode & (to_decode.cumsum(dim=1) <= self.k)


class RandomStage2(D2Cache):
    """Stage 2 takes as many known positions, but any."""

    def attended(self, state):
        n = super().attended(state).sum(dim=1, keepdim=True)
        return highest(torch.rand_like(state.confidence), state.known, n)


class LastLayer(D2Cache):
    """Stage 2 takes a nucleus of the last layer's attention, its column sums: no rollout."""

    def recompute(self, model, cache, state, positions, valid, R):
        hidden, maps = model.hidden_states(state.tokens, positions, cache, True, state.padding)
        predicting = hidden[:, :R]
        if model.config.shifted:
            predicting = rows_before(hidden, positions, R, state.tokens.shape[1])
        return model.head(predicting), (maps[-1] * valid[..., None]).sum(dim=1)


class WithoutStage2(D2Cache):
    """Stage 2 takes nothing: of the known positions only the fresh ones are left."""

    uses_attention = False

    def attended(self, state):
        return torch.zeros_like(state.known)


class AllButThePrompt(D2Cache):
    """Everything but the prompt, which is never read again."""

    uses_attention = False

    def choose(self, state):
        return state.masked | (state.decoded_at > 0)


CONTROLS = {
    "  stage 1 at random": RandomStage1,
    "  stage 1 a window": WindowStage1,
    "  stage 2 at random": RandomStage2,
    "  stage 2 oldest first": OldestFirst,
    "  stage 2 by last layer": LastLayer,
    "  without stage 2": WithoutStage2,
    "  all but the prompt": AllButThePrompt,
}

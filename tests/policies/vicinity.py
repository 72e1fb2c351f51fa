"""Vicinity refresh, of dInfer: arXiv 2510.08666, github.com/inclusionAI/dInfer."""

from dataclasses import dataclass

import torch.nn.functional as F


@dataclass(frozen=True)
class Vicinity:
    """The block and `margin` positions on both sides; everything when a block starts.

    And everything in the decode's first `warmup` steps. This is the rule of dInfer's code, class
    VicinityCacheIteration, and the defaults are those of its scripts.
    """

    margin: int = 16
    warmup: int = 4
    uses_attention = False

    def choose(self, state):
        width = 2 * self.margin + 1
        block = state.block.float()
        around = F.max_pool1d(block, width, stride=1, padding=self.margin) > 0  # (B, T) -> (B, T)
        return around | state.block_starts | (state.step < self.warmup)

"""EntropyCache: arXiv 2603.18489; what follows is taken from its abstract."""

from dataclasses import dataclass

from d2cache import highest


@dataclass(frozen=True)
class EntropyCache:
    """Everything if the last step was unsure of what it committed, else what changes anyway.

    That is the block's masked positions and the k decoded last. The paper's measure is the largest
    entropy of the committed tokens' distributions. A State holds none, so here it is the largest
    -log confidence in nats: the entropy of order infinity, never above Shannon's. Left open by the
    abstract, and chosen here: threshold, k, which masked positions, and all that are fresh.
    """

    threshold: float = 0.5
    k: int = 8
    uses_attention = False

    def choose(self, state):
        surprise = -state.confidence.log()
        unsure = (state.fresh & (surprise > self.threshold)).any(dim=1, keepdim=True)
        decoded = state.decoded_at > 0
        last = highest(state.decoded_at.float(), decoded, self.k)
        return unsure | (state.block & state.masked) | last | state.fresh

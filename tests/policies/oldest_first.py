"""Oldest first: ours, the control of d2Cache's stage 2."""

from dataclasses import dataclass

from d2cache import D2Cache, highest


@dataclass(frozen=True)
class OldestFirst(D2Cache):
    """d2Cache, with as many known positions in stage 2, but those recomputed longest ago.

    Influence alone says how many; so at the same cost it is a rota without a look at attention.
    """

    def attended(self, state):
        n = super().attended(state).sum(dim=1, keepdim=True)
        age = state.step - state.recomputed_at
        return highest(age.float(), state.known, n)

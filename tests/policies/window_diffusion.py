"""Window-Diffusion: arXiv 2601.20332, github.com/vhicrgit/Window-Diffusion."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowDiffusion:
    """Every n steps everything, else the first masked positions and those decoded since.

    The defaults are those of the authors' LLaDA script. Theirs also hides the masked positions
    beyond a second, wider window from attention; here all positions are attended to. As in
    their code, what a step that recomputes everything decodes is recomputed once, not until the next.
    """

    n: int = 32
    active: int = 16
    uses_attention = False

    def choose(self, state):
        first = state.masked & (state.masked.cumsum(dim=1) <= self.active)
        refreshed_at = state.step // self.n * self.n + 1  # steps 1, n + 1, 2 n + 1 and so on
        since = state.decoded_at > refreshed_at
        everything = state.step % self.n == 0
        return first | since | state.fresh | everything

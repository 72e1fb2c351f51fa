"""The method of d2Cache, to be implemented: copy this file, and fill in one function after another.

    python -m pytest --solution=mine.py

puts every function that mine.py defines through its laws, in the place of the reference's, and
prints the points. So work in any order, and delete what you do not want graded. Tensors in, tensors
out: arguments are left as they are. Loops over sequences or positions are no fault here.

Shapes: B sequences, T positions of a canvas (prompt, then response), Q of them recomputed, R of
these predicted, L layers. Paper: arXiv 2509.23094, its equation numbers are the first version's.
"""

from dataclasses import dataclass

import torch


# ---- Stage 1: what is decoded next ---------------------------------------------------------------


def certainty_density(known, sigma, dtype=torch.float32):
    """Share of known positions around each one, in a Gaussian window of sigma positions.  Eq. 3.

    D(i) = sum over known j of w(i - j), divided by the sum of w(d) over all distances d from
    -(T - 1) to T - 1, with w(d) = exp(-d^2 / (2 sigma^2)). Known positions count themselves.

    known (B, T) bool, sigma in positions -> (B, T) of `dtype`, from 0 to 1

    Known 1 1 0 0 and sigma 1: w is 1 at distance 0, then .607, .135 and .011 on either side, 2.506
    in all. The third position has (.607 + .135) / 2.506 = .30, and all four .64 .64 .30 .06.
    """
    raise NotImplementedError


def certainty_prior(confidence, known, sigma):
    """Confidence times certainty density, which is computed in the confidence's dtype.

    confidence (B, T) from 0 to 1, known (B, T) bool -> (B, T)

    In the example above, the third position with confidence .5 has .15, the fourth with .9 has .05.
    """
    raise NotImplementedError


# ---- Stage 2: what is listened to ----------------------------------------------------------------


def attention_rollout(maps, positions, valid):
    """Influence of each position on the last layer's output: column sums of W_L ... W_1.  Eq. 6-9.

    W_l = (A_l + I) / 2 in the rows of recomputed positions, where A_l is the attention of layer l:
    its rows sum to 1. Any other row of W_l is that of the identity I. No T x T matrix need ever be
    built: what does W_l do to the row vector that comes from the left?

    maps       L layers, the first one first, each (B, Q, T): the recomputed rows of A_l
    positions  (B, Q) integers: whose rows these are
    valid      (B, Q) bool: other rows are there to fill, repeat a position, and do not count
    -> (B, T), of the maps' dtype; each row sums to T

    Three positions, the first and the last recomputed. First layer's rows of A: (.5 .25 .25) and
    (0 .5 .5), last layer's: (.5 .5 0) and (.25 .25 .5). The influence is (.656 1.672 .672); that of
    the last layer alone would be (.875 1.375 .75).
    """
    raise NotImplementedError


def nucleus(score, p, among):
    """The smallest set of positions `among` whose share of their summed score exceeds p.

    Take the highest score first, of equal ones the first position, and no position of score 0.
    But take one in any case, if `among` has any; and with p = 1 take all of them.

    score (B, T) at least 0, p from 0 to 1, among (B, T) bool -> (B, T) bool

    Scores .5 .3 .2 and p .6: the first two, which hold .8. With p .5 too, as .5 does not exceed .5.
    """
    raise NotImplementedError


def highest(score, among, n):
    """Of the positions `among`, the n of highest score; of equal ones the first. All, if too few.

    score (B, T) finite, among (B, T) bool; n an integer, or one for each sequence, (B, 1)
    -> (B, T) bool

    Scores .2 .9 .5 and n 2: the second and the third.
    """
    raise NotImplementedError


# ---- A step --------------------------------------------------------------------------------------


def pack(chosen, predicted, Q):
    """Chosen positions in Q rows for each sequence: the predicted ones, then the others.

    Both in ascending order. Rows that are left over repeat the first row, and are not valid; in a
    sequence that chose nothing any position will do.

    chosen, predicted (B, T) bool, predicted ones are chosen; Q at least the most that any sequence
    chose -> positions (B, Q) integers, valid (B, Q) bool

    Chosen {1, 4, 6}, predicted {4, 6} and Q 5: positions 4 6 1 4 4, valid 1 1 1 0 0.
    """
    raise NotImplementedError


def unpack(packed, predicted):
    """What stands in the first R rows of `pack`, back at its positions.

    packed (B, R), predicted (B, T) bool, R the most of any sequence -> (B, T), of packed's dtype;
    at positions that are not predicted any value will do

    Predicted {4, 6} and packed (a b): a at 4, b at 6.
    """
    raise NotImplementedError


def unmask(state, predicted, confidence, by_prior, tokens_per_step, threshold):
    """Which positions to commit, of those that are predicted and in the block.

    The `tokens_per_step` of highest score, of equal ones the first: by confidence or, if by_prior,
    by confidence times state.density. And all whose confidence is at least the threshold, unless
    that is None.

    state a d2cache.State, predicted (B, T) bool, confidence (B, T) -> (B, T) bool

    Confidences .9 .2 .8 .7, all of them predicted, the last not in the block: one token a step
    commits the first, and with a threshold of .7 the third too.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class D2Cache:
    """The policy: k masked positions, a nucleus p of the known ones, and the fresh ones."""

    k: int = 32
    p: float = 0.1
    sigma: float | None = None
    uses_attention = True

    def choose(self, state):
        return self.about_to_be_decoded(state) | self.attended(state) | state.fresh

    def about_to_be_decoded(self, state):
        """Stage 1, Eq. 4: the k masked positions of highest certainty prior.

        Those of the block come first; if there are fewer than k, the best elsewhere fill up. The
        density is state.density or, if the policy has a sigma, one with that sigma.

        state a d2cache.State: masked, known, block, confidence, density (B, T) -> (B, T) bool

        k 3, masked 0 1 1 1 1, block 0 1 1 0 0 and priors . .1 .2 .9 .3: the second, third, fourth.
        """
        raise NotImplementedError

    def attended(self, state):
        """Stage 2, Eq. 9: the nucleus p of state.influence among the known positions.

        state a d2cache.State: influence, known (B, T) -> (B, T) bool

        Known 1 1 1 0, influence 2 1 1 9 and p .6: the first two, which hold 3 of 4.
        """
        raise NotImplementedError

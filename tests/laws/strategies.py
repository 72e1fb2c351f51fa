"""What the tests draw: models, canvases, policies. Drawn things print as what they are."""

from dataclasses import dataclass

import torch
from d2cache import (
    D2Cache,
    DelayedCache,
    DualCache,
    PrefixCache,
    RecomputeAll,
    SlidingWindow,
)
from hypothesis import strategies as st
from model import Config, Transformer

from entropy_cache import EntropyCache
from oldest_first import OldestFirst
from vicinity import Vicinity
from window_diffusion import WindowDiffusion


@dataclass(frozen=True)
class AnySubset:
    """A policy without a plan: half of the positions, and the first masked one of the block.

    Which half depends on the sequence and the step alone: so it chooses the same in company.
    """

    seed: int
    uses_attention: bool

    def choose(self, state):
        chosen = torch.zeros_like(state.known)
        for row, known in enumerate(state.known):
            random = torch.Generator().manual_seed(1000 * self.seed + state.step)
            real = (known | state.masked[row]).nonzero()[:, 0]
            chosen[row, real] = torch.rand(len(real), generator=random) < 0.5
            to_decode = (state.block[row] & ~known).nonzero()[:, 0]
            chosen[row, to_decode[:1]] = True
        return chosen


# Every law of a policy, in test_decoding.py and test_graphs.py, is tried on this table. Add yours.
POLICIES = {
    "RecomputeAll": st.just(RecomputeAll()),
    "PrefixCache": st.just(PrefixCache()),
    "DualCache": st.just(DualCache()),
    "DelayedCache": st.builds(DelayedCache, interval=st.integers(1, 4)),
    "SlidingWindow": st.builds(SlidingWindow, width=st.integers(1, 5)),
    "D2Cache": st.builds(
        D2Cache,
        k=st.integers(1, 8),
        p=st.sampled_from([0.1, 0.5, 0.0, 1.0]),
        sigma=st.sampled_from([None, 0.5, 10.0]),
    ),
    "Vicinity": st.builds(Vicinity, margin=st.integers(1, 4), warmup=st.integers(1, 3)),
    "WindowDiffusion": st.builds(WindowDiffusion, n=st.integers(1, 5), active=st.integers(1, 4)),
    "EntropyCache": st.builds(EntropyCache, threshold=st.floats(0.1, 3), k=st.integers(1, 4)),
    "OldestFirst": st.builds(OldestFirst, k=st.integers(1, 8), p=st.sampled_from([0.1, 0.5])),
    "AnySubset": st.builds(AnySubset, seed=st.integers(0, 99), uses_attention=st.booleans()),
}


@dataclass(frozen=True)
class ModelSpec:
    """A random model that a failing example can print: sizes and the seed of its weights."""

    n_layers: int
    n_kv_heads: int
    queries_per_kv_head: int
    half_head_dim: int
    vocab_size: int
    seed: int
    dtype: torch.dtype = torch.float64
    dream: bool = False  # shifted logits, and biases
    tied: bool = False

    def config(self):
        n_heads = self.n_kv_heads * self.queries_per_kv_head
        return Config(
            d_model=n_heads * 2 * self.half_head_dim,
            n_layers=self.n_layers,
            n_heads=n_heads,
            n_kv_heads=self.n_kv_heads,
            mlp_hidden_size=12,
            vocab_size=self.vocab_size,
            embedding_size=self.vocab_size,
            max_sequence_length=64,
            rope_theta=100.0,  # small, so that a dozen positions already turn far apart
            rms_norm_eps=1e-5,
            mask_token_id=self.vocab_size // 2,
            eos_token_id=0,
            include_qkv_bias=self.dream,
            weight_tying=self.tied,
            model_type="Dream" if self.dream else "llada",
        )

    def build(self):
        """Weights of such a size that attention is sharp and the arg-max depends on the context."""
        model = Transformer(self.config()).double().requires_grad_(False)
        random = torch.Generator().manual_seed(self.seed)
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random, dtype=torch.float64)
            if name.endswith("bias"):
                weight.copy_(0.5 * noise)
            elif weight.dim() == 1:
                weight.copy_(1 + 0.3 * noise)
            elif name == "wte.weight":
                weight.copy_(noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
        if self.tied:  # an embedding is larger than a head
            model.ln_f.weight.mul_(self.config().d_model ** -0.5)
        return model.to(self.dtype)


def model_specs(dtypes=(torch.float64,)):
    return st.builds(
        ModelSpec,
        n_layers=st.integers(1, 3),
        n_kv_heads=st.integers(1, 2),
        queries_per_kv_head=st.integers(1, 2),
        half_head_dim=st.integers(1, 4),
        vocab_size=st.integers(4, 12),
        seed=st.integers(0, 2**16),
        dtype=st.sampled_from(dtypes),
        dream=st.booleans(),
        tied=st.booleans(),
    )


@st.composite
def token_rows(draw, config, batch_size, length):
    """batch_size lists of `length` token ids; any id may occur, that of [MASK] too."""
    row = st.lists(st.integers(0, config.vocab_size - 1), min_size=length, max_size=length)
    return draw(st.lists(row, min_size=batch_size, max_size=batch_size))


def left_padded(rows):
    """Prompts, lists of ids, as tensors (B, P): tokens, and the mask that `generate` wants."""
    P = max(len(row) for row in rows)
    tokens = [[3] * (P - len(row)) + row for row in rows]
    mask = [[0] * (P - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens, dtype=torch.long), torch.tensor(mask)


@dataclass(frozen=True)
class Decode:
    """One call of `generate`, without its model: prompts, of any lengths, and settings."""

    prompts: list
    gen_length: int
    block_length: int | None
    tokens_per_step: int
    sigma: float | str | None
    threshold: float | None

    @property
    def prompt_length(self):
        return max(len(row) for row in self.prompts)

    def settings(self):
        return {name: value for name, value in vars(self).items() if name != "prompts"}

    def arguments(self):
        prompt, mask = left_padded(self.prompts)
        return {"prompt": prompt, "prompt_mask": mask, **self.settings()}


@st.composite
def decodes(draw, config, most_sequences=3):
    """Prompts of 1 to 5 tokens, 1 to 3 blocks of 1 to 5 tokens (or no blocks), any step size.

    A prompt may hold [MASK], but not first: on a canvas of masks alone all positions are equal, and
    round-off would choose among them.
    """
    id = st.integers(0, config.vocab_size - 1)
    first = id.map(lambda id: 0 if id == config.mask_token_id else id)
    row = st.builds(lambda id, ids: [id, *ids], first, st.lists(id, max_size=4))
    prompts = draw(st.lists(row, min_size=1, max_size=most_sequences))
    n_blocks, length = draw(st.sampled_from([2, 1, 3])), draw(st.sampled_from([4, 3, 5, 2, 1]))
    return Decode(
        prompts=prompts,
        gen_length=n_blocks * length,
        block_length=draw(st.sampled_from([length, None])),
        tokens_per_step=draw(st.sampled_from([1, 2, 3])),
        sigma=draw(st.sampled_from(["auto", None, 2.0, 0.5, 10.0])),
        threshold=draw(st.sampled_from([None, 0.5, 0.9, 0.0])),
    )

"""The laws that a GPU could break: the same decodes on CUDA, where the fast kernels run."""

import pytest
import torch
from d2cache import D2Cache, DualCache, PrefixCache, RecomputeAll, generate

from strategies import ModelSpec

pytestmark = pytest.mark.gpu
SPEC = dict(n_layers=3, n_kv_heads=2, queries_per_kv_head=2, half_head_dim=16, vocab_size=40)
PROMPT_LENGTH, GEN_LENGTH = 20, 32


def decode(model, policy, **arguments):
    """Tokens and the confidences of every step, for three prompts."""
    random, confidences = torch.Generator().manual_seed(1), []
    prompt = torch.randint(0, 19, (3, PROMPT_LENGTH), generator=random).cuda()
    observe = lambda state, chosen: confidences.append(state.confidence)  # noqa: E731
    return generate(model, prompt, GEN_LENGTH, policy=policy, on_step=observe, **arguments), confidences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", [{}, {"sigma": 4.0}, {"block_length": 8, "tokens_per_step": 2}])
@pytest.mark.parametrize("seed", range(5))
def test_full_refresh_is_vanilla_bit_for_bit(dtype, arguments, seed):
    model = ModelSpec(**SPEC, seed=seed, dtype=dtype).build().cuda()
    vanilla, confidences = decode(model, RecomputeAll(), **arguments)
    refreshed, other = decode(model, D2Cache(k=PROMPT_LENGTH + GEN_LENGTH, p=1), **arguments)
    assert torch.equal(refreshed, vanilla)
    assert all(torch.equal(x, y) for x, y in zip(confidences, other, strict=True))


@pytest.mark.parametrize("policy", [RecomputeAll(), PrefixCache(), DualCache(), D2Cache(k=4)])
def test_float64_decodes_to_the_tokens_of_the_cpu(policy):
    model = ModelSpec(**SPEC, seed=0).build()
    random = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, 19, (3, PROMPT_LENGTH), generator=random)
    expected = generate(model, prompt, GEN_LENGTH, 8, policy=policy)
    assert torch.equal(generate(model.cuda(), prompt, GEN_LENGTH, 8, policy=policy).cpu(), expected)

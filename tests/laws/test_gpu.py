"""The laws that a GPU could break: the same decodes on CUDA, where the fast kernels run."""

import warnings

import pytest
import torch
from bench import CudaGraphs
from d2cache import D2Cache, DelayedCache, DualCache, PrefixCache, RecomputeAll, SlidingWindow
from d2cache import decode, generate

from strategies import ModelSpec

pytestmark = pytest.mark.gpu
SPEC = dict(n_layers=3, n_kv_heads=2, queries_per_kv_head=2, half_head_dim=16, vocab_size=40)
PROMPT_LENGTH, GEN_LENGTH = 20, 32


EVERY_POLICY = pytest.mark.parametrize(
    "policy",
    [RecomputeAll(), PrefixCache(), DualCache(), DelayedCache(), SlidingWindow(), D2Cache(k=4)],
)


def decoded(model, policy, **arguments):
    """Tokens and the confidences of every step, for three prompts."""
    random = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, 19, (3, PROMPT_LENGTH), generator=random).cuda()
    states = list(decode(model, prompt, GEN_LENGTH, policy=policy, **arguments))
    return states[-1].tokens, [state.confidence for state in states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments", [{}, {"sigma": 4.0}, {"block_length": 8, "tokens_per_step": 2}]
)
@pytest.mark.parametrize("seed", range(5))
def test_full_refresh_is_vanilla_bit_for_bit(dtype, arguments, seed):
    model = ModelSpec(**SPEC, seed=seed, dtype=dtype).build().cuda()
    vanilla, confidences = decoded(model, RecomputeAll(), **arguments)
    refreshed, other = decoded(model, D2Cache(k=PROMPT_LENGTH + GEN_LENGTH, p=1), **arguments)
    assert torch.equal(refreshed, vanilla)
    assert all(torch.equal(x, y) for x, y in zip(confidences, other, strict=True))


@pytest.mark.parametrize("dream", [False, True])
@EVERY_POLICY
def test_float64_decodes_to_the_tokens_of_the_cpu(policy, dream):
    """Prompts of different length, tokens committed in parallel, and graphs among it all."""
    model = ModelSpec(**SPEC, seed=0, dream=dream).build()
    random = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, 19, (3, PROMPT_LENGTH), generator=random)
    mask = torch.arange(PROMPT_LENGTH) >= torch.tensor([[0], [5], [12]])
    settings = dict(block_length=8, policy=policy, prompt_mask=mask, threshold=0.8)
    expected = generate(model, prompt, GEN_LENGTH, **settings)
    graphs = CudaGraphs(model.cuda())
    assert torch.equal(generate(model, prompt, GEN_LENGTH, **settings).cpu(), expected)
    *_, state = decode(model, prompt, GEN_LENGTH, forward=graphs.recompute, **settings)
    assert torch.equal(state.tokens.cpu(), expected)


def test_sampled_full_refresh_is_vanilla_bit_for_bit():
    model = ModelSpec(**SPEC, seed=1, dtype=torch.bfloat16).build().cuda()

    def sample(policy):
        generator = torch.Generator("cuda").manual_seed(3)
        return decoded(model, policy, temperature=0.7, generator=generator)[0]

    everything = D2Cache(k=PROMPT_LENGTH + GEN_LENGTH, p=1)
    assert torch.equal(sample(everything), sample(RecomputeAll()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_POLICY
def test_graphs_decode_what_separate_launches_decode(policy, dtype):
    """Also when the graphs, and the cache they know, are used again."""
    model = ModelSpec(**SPEC, seed=4, dtype=dtype).build().cuda()
    graphs = CudaGraphs(model)
    expected, _ = decoded(model, policy, block_length=8)
    for _ in range(2):
        tokens, _ = decoded(model, policy, block_length=8, forward=graphs.recompute)
        assert torch.equal(tokens, expected)


def test_a_replayed_step_waits_for_the_gpu_once():
    model = ModelSpec(**SPEC, seed=4, dtype=torch.bfloat16).build().cuda()
    graphs, policy = CudaGraphs(model), D2Cache(k=4)
    decoded(model, policy, forward=graphs.recompute)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        decoded(model, policy, forward=graphs.recompute)
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    assert GEN_LENGTH <= len(waits) <= GEN_LENGTH + 12  # a few check the prompt


def test_the_first_step_of_4096_positions_needs_little_beside_the_maps():
    """Eight heads at once would take 537 MB a layer in float32; the slices take a few."""
    spec = ModelSpec(2, 8, 1, 32, 40, seed=0, dtype=torch.bfloat16)
    model, tokens = spec.build().cuda(), torch.ones(1, 4096, dtype=torch.long).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, maps = model(tokens, return_attention=True)
    assert torch.cuda.max_memory_allocated() - before < maps.nbytes + 400 * 2**20

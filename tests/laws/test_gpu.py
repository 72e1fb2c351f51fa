"""The laws that a GPU could break: the same decodes on CUDA, where the fast kernels run."""

import warnings
from dataclasses import replace

import bench
import pytest
import torch
from bench import CPU_SHAPE, FASTEST_FIRST, CudaGraphs
from d2cache import D2Cache, DelayedCache, DualCache, PrefixCache, RecomputeAll, SlidingWindow
from d2cache import decode, generate
from model import KVCache
from torch.nn.attention import sdpa_kernel

from strategies import ModelSpec

pytestmark = pytest.mark.gpu
SPEC = dict(n_layers=3, n_kv_heads=2, queries_per_kv_head=2, half_head_dim=16, vocab_size=40)
PROMPT_LENGTH, GEN_LENGTH = 20, 32
SMALL = replace(CPU_SHAPE, d_model=64, n_layers=2, mlp_hidden_size=64)


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


def cache_of(model):
    """A cache for these prompts and responses."""
    dtype = model.wte.weight.dtype
    return KVCache(model.config, 3, PROMPT_LENGTH + GEN_LENGTH, "cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments", [{"sigma": None}, {"sigma": 4.0}, {"block_length": 8, "tokens_per_step": 2}]
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
    settings = dict(block_length=8, prompt_mask=mask, threshold=0.8)
    expected = generate(model, prompt, GEN_LENGTH, policy=policy, **settings)
    model = model.cuda()
    for on_gpu in (policy, CudaGraphs(policy, bucket=8)):
        tokens = generate(model, prompt, GEN_LENGTH, policy=on_gpu, **settings)
        assert torch.equal(tokens.cpu(), expected)


def test_sampled_full_refresh_is_vanilla_bit_for_bit():
    model = ModelSpec(**SPEC, seed=1, dtype=torch.bfloat16).build().cuda()

    def sample(policy):
        generator = torch.Generator("cuda").manual_seed(3)
        return decoded(model, policy, temperature=0.7, generator=generator)[0]

    everything = D2Cache(k=PROMPT_LENGTH + GEN_LENGTH, p=1)
    assert torch.equal(sample(everything), sample(RecomputeAll()))


@pytest.mark.parametrize("dtype, bucket", [(torch.bfloat16, 1), (torch.float32, 4)])
@EVERY_POLICY
def test_graphs_decode_what_separate_launches_decode(policy, dtype, bucket):
    """In bfloat16 with equal sizes, bit for bit; rounded sizes change round-off, but no token.

    Buckets are small, so that many graphs share the pool; the second decode uses them again.
    """
    model = ModelSpec(**SPEC, seed=4, dtype=dtype).build().cuda()
    graphs, cache = CudaGraphs(policy, bucket), cache_of(model)
    with sdpa_kernel(FASTEST_FIRST, set_priority=True):  # as in the graphs
        expected, confidences = decoded(model, policy, block_length=8)
    for _ in range(2):
        tokens, other = decoded(model, graphs, block_length=8, cache=cache)
        assert torch.equal(tokens, expected)
        if bucket == 1:
            assert all(torch.equal(x, y) for x, y in zip(confidences, other, strict=True))
    captured = list(graphs.graphs.values())
    decoded(model, graphs, block_length=8, cache=cache)
    assert list(graphs.graphs.values()) == captured and captured


def test_graphs_of_another_cache_follow_it_and_leave_no_second_cache():
    model = ModelSpec(**SPEC, seed=4).build().cuda()
    policy = D2Cache(k=4)
    graphs = CudaGraphs(policy, bucket=8)
    expected, _ = decoded(model, policy)
    for _ in range(2):
        cache = cache_of(model)
        for _ in range(2):
            assert torch.equal(decoded(model, graphs, cache=cache)[0], expected)
        assert graphs.cache is cache


def test_a_replayed_step_waits_for_the_gpu_once():
    model = ModelSpec(**SPEC, seed=4, dtype=torch.bfloat16).build().cuda()
    graphs, cache = CudaGraphs(D2Cache(k=4)), cache_of(model)
    decoded(model, graphs, cache=cache)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            decoded(model, graphs, cache=cache)
        finally:
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
    held = sum(attention.nbytes for attention in maps)
    assert torch.cuda.max_memory_allocated() - before < held + 400 * 2**20


def test_bench_py_measures_every_row_launched_and_replayed():
    args = bench.make_parser().parse_args(["--device", "cuda"])
    workload = bench.Race(SMALL, torch.bfloat16, (20,), gen_length=16, batch=2)
    ((_, _, speed),) = bench.report_race(workload, "small", args, own={})
    names = [row["policy"] for row in speed["rows"]]
    assert names[1::2] == [f"{name}, replayed" for name in names[::2]] and len(names) == 12
    assert all(row["ms per step"] > 0 and row["peak GiB"] is not None for row in speed["rows"])
    assert all(speed[rate] > 0 for rate in ("copy GB/s", "matrix TFLOP/s", "ridge rows"))


def test_bench_py_runs_as_its_command_line_says():
    """It once named the device to torch without a number, which torch refuses."""
    args = bench.make_parser().parse_args(
        ["--device", "cuda", "--world", "tiny", "--problems", "1"]
    )
    ((kind, _, numbers),) = bench.reports(args)
    assert kind == "quality" and len(numbers["rows"]) > 12

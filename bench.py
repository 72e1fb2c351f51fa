"""Quality and speed of every policy, as tables: `python bench.py`.

Quality: small models that ship with the project solve problems they have not seen, in every order
of decoding, exactly and from caches; then controls replace or leave out a part of d2Cache. Speed:
random weights at a size that suits the device, beside the floor: the time that reading the weights
or the arithmetic takes at the rates measured here. With --model, the speed of a real checkpoint,
and with --data its score.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from d2cache import EXAMPLE, WORLDS, RecomputeAll, decode, load_module, load_policy
from d2cache import paper_block_length, paper_settings, recompute, run_program
from model import DTYPES, Config, KVCache, Transformer, decode_response, encode_prompt
from model import load_tokenizer, require, require_device

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- Settings ------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
GRADER = ROOT / "tests" / "scoring" / "scores.py"  # of --data
CONTROLS = ROOT / "tests" / "policies" / "controls.py"  # d2Cache with a part replaced or left out
THRESHOLD = 0.9  # of the rows that commit several tokens in a step

RUNS = 3  # timed decodes of a row
LONG_RUN = 3.0  # seconds, after which no further decode of the row is started
VANILLA_STEPS = 4  # timed steps of a vanilla decode, whose steps are alike

LLADA_8B_SHAPE = Config(
    d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288,
    vocab_size=126464, embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0,
    rms_norm_eps=1e-5, mask_token_id=126336, eos_token_id=126081,
)  # fmt: skip
CPU_SHAPE = replace(  # an eighth as wide and a quarter as deep
    LLADA_8B_SHAPE, d_model=512, n_layers=8, n_heads=4, n_kv_heads=4, mlp_hidden_size=1536,
    vocab_size=15808, embedding_size=15808, mask_token_id=15792, eos_token_id=15760,
)  # fmt: skip
LLADA_8B_BYTES = 23e9  # of free memory: tensors and graphs 22 GB, CUDA's context and libraries 1

# Timed without a checkpoint: a table for each length in `prompts`.
Race = namedtuple("Race", "config dtype prompts gen_length batch")
LLADA_8B_RACE = Race(
    LLADA_8B_SHAPE, torch.bfloat16, prompts=(128, 896, 3840), gen_length=256, batch=1
)
# On a CPU two sequences at once: one alone leaves small matrices, and waits for the memory.
CPU_RACE = Race(CPU_SHAPE, torch.float32, prompts=(384,), gen_length=64, batch=2)

# ---- Tables --------------------------------------------------------------------------------------

# Columns printed in %, by their last word; two of them are the leaderboard's.
SHARES = ["match", "pass@1", "strict", "text", "reused", "solved", "same"]
EXPLAINED = {  # under the title of a table
    "quality": "beside exact decoding (vanilla) in the same order: problems that only it solves, "
    "or only exact decoding; share of texts that are the same;\n"
    "same x reused: their product, to rank policies by; "
    f"prior, from {THRESHOLD}: commits all predictions so sure, too",
    "speed": f"medians of the runs (of vanilla only the first {VANILLA_STEPS} steps); "
    "floor: reading all weights, or above `ridge rows` the arithmetic;\n"
    "at best: the speed-up if a step took its floor",
}


# A row to be measured: who decodes, in which order, with which arguments of `decode`; and whether
# it stands in the speed table, too.
Row = namedtuple("Row", "policy order arguments timed")


def cell(name, value):
    """A value of a column as it is printed; "-" where it was not measured."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " to ".join(f"{bound:.1%}" for bound in value)
    if isinstance(value, float):
        return f"{value:.1%}" if name.split()[-1] in SHARES else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table_text(rows):
    """Rows, dicts by column, as aligned lines: texts left, numbers right."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([cell(column, value) for column, value in row.items()])
    widths = [max(len(text) for text in column) for column in zip(*cells)]
    is_text = [isinstance(value, str) for value in rows[0].values()]

    lines = []
    for row in cells:
        aligned = []
        for text, width, left in zip(row, widths, is_text):
            aligned.append(text.ljust(width) if left else text.rjust(width))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def report(kind, facts, settings, rows, notes):
    """A table. facts of model and machine, settings of the run, notes below the rows: all dicts.

    -> its kind, the text to print, the numbers to write
    """
    lines = [
        f"{kind.upper()}  {listed(facts)}",
        EXPLAINED[kind],
        listed(settings),
        table_text(rows),
    ]
    if notes:
        lines.append(listed(notes))
    lines.append("")
    return kind, "\n".join(lines), facts | settings | {"rows": rows} | notes


def facts_of(name, model):
    """What a table says of the model that was measured."""
    weight = model.wte.weight
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(weight.dtype),
        "device": device_name(weight.device),
    }


def listed(facts):
    """{"batch": 4, "ridge rows": 27.3} -> "batch 4, ridge rows 27.30" """
    return ", ".join(f"{name} {cell(name, value)}" for name, value in facts.items())


def device_name(device):
    """A GPU's name; of a CPU, how many threads torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


# ---- Quality -------------------------------------------------------------------------------------

# The question is what is judged, the prompt what the model reads: --shots puts worked examples
# before the question. `where` names it in messages. scores.py makes its own, with these fields.
Problem = namedtuple("Problem", "where question prompt answer")


@dataclass(frozen=True)
class Task:
    """A model, and problems for it, if any, with who judges its answers."""

    name: str
    model: Transformer
    tokenizer: object
    gen_length: int
    problems: tuple = ()
    is_right: Callable | None = None  # problem, text -> (right, right by the strict score)
    score: str = "exact match"


# What came of a row, as lists over the problems: texts; whether right, and strictly right; forwards
# of the decode; and the mean share of positions recomputed in them.
Outcome = namedtuple("Outcome", "texts right strict forwards shares")


def make_plan(gen_length, own):
    """Rows of the quality table, those with `timed` of the speed table, too.

    Vanilla, window and d2Cache decode in all three orders; vanilla, which is exact, first. With
    own, {name: policy} of --policy, that one follows in all three orders, and nothing else.
    Without, the other caches follow, the controls, and a threshold.
    """
    orders = {
        "confidence": {"sigma": None},
        "blocks": {"block_length": paper_block_length(gen_length)},  # by confidence in each
        "prior": {},
    }
    ours = {name: arguments["policy"] for name, arguments in paper_settings(gen_length).items()}
    plan = []

    def add(name, policy, order, timed):
        plan.append(Row(name, order, orders[order] | {"policy": policy}, timed))

    compared = {"vanilla": ours["vanilla"], "window": ours["window"], "d2Cache": ours["d2cache"]}
    for name, policy in (compared | own).items():
        for order in orders:
            add(name, policy, order, timed=name in own or order == "prior")
    if own:
        return plan

    for name in ("prefix", "dual", "delayed"):
        add(f"{name} cache", ours[name], "blocks", timed=True)
    for name, control in load_module(CONTROLS).CONTROLS.items():  # classes derived from D2Cache
        add(name, control(**vars(ours["d2cache"])), "prior", timed=False)
    for name in ("vanilla", "d2Cache"):
        arguments = {"policy": compared[name], "threshold": THRESHOLD}
        plan.append(Row(name, f"prior, from {THRESHOLD}", arguments, timed=False))
    return plan


def encode_problems(task):
    """The prompts, each (P,); ValueError names the first that has no ids, or too many."""
    longest = task.model.config.max_sequence_length - task.gen_length
    prompts = []
    for problem in task.problems:
        try:
            prompt = encode_prompt(task.tokenizer, problem.prompt)[0]
        except ValueError as error:
            raise ValueError(f"{problem.where}: {error}") from error
        fault = f"{problem.where}: the prompt has {len(prompt)} tokens, should have at most"
        require(len(prompt) <= longest, f"{fault} {longest} before a response of {task.gen_length}")
        prompts.append(prompt)
    return prompts


def left_padded(prompts):
    """Prompts (P,) of different length as one tensor, and its mask.  -> 2 x (B, longest P)"""
    longest = max(len(prompt) for prompt in prompts)
    padded = []
    real = []
    for prompt in prompts:
        before = (longest - len(prompt), 0)
        padded.append(F.pad(prompt, before))
        real.append(F.pad(torch.ones_like(prompt), before))
    return torch.stack(padded), torch.stack(real)


def work_done(policy, states):
    """Forwards of each sequence, and its mean share of positions recomputed in them.  2 x (B,)

    A policy with a forward pass of its own says in `recomputed` what that was: see d2cache.Policy.
    """
    chosen = torch.stack([state.chosen for state in states])  # (S, B, T) of S steps
    forwards = chosen.any(dim=2).sum(dim=0)  # a finished sequence chooses nothing
    recomputed = chosen
    if hasattr(policy, "recomputed"):
        recomputed = torch.stack(policy.recomputed)

    positions = torch.full_like(forwards, chosen.shape[2])
    if states[0].padding is not None:
        positions = positions - states[0].padding.sum(dim=1)
    return forwards, recomputed.sum(dim=(0, 2)) / (forwards * positions)


def solve(task, prompts, arguments, batch, progress):
    """The Outcome of decoding every prompt, so many at once, with these arguments of `decode`."""
    texts = []
    forwards = []
    shares = []
    for start in range(0, len(prompts), batch):
        prompt, mask = left_padded(prompts[start : start + batch])
        states = list(decode(task.model, prompt, task.gen_length, prompt_mask=mask, **arguments))
        for response in states[-1].tokens[:, prompt.shape[1] :]:
            texts.append(decode_response(task.tokenizer, response, task.model.config.end_ids))
        batch_forwards, batch_shares = work_done(arguments["policy"], states)
        forwards += batch_forwards.tolist()
        shares += batch_shares.tolist()
        progress.update(len(prompt))

    marks = [task.is_right(problem, text) for problem, text in zip(task.problems, texts)]
    right, strict = zip(*marks)
    return Outcome(texts, list(right), list(strict), forwards, shares)


def wilson_interval(solved, n):
    """Where the true share lies in 95 of 100 such samples, by Wilson's score: two in [0, 1].

    Unlike 1.96 standard errors it has a width if all were solved: 200 of 200 are (0.981, 1).
    """
    z = 1.96
    share = solved / n
    middle = share + z**2 / (2 * n)
    variance = share * (1 - share) / n + z**2 / (4 * n**2)
    reach = z * math.sqrt(variance)
    whole = 1 + z**2 / n
    least = (middle - reach) / whole
    most = (middle + reach) / whole
    return max(0.0, least), min(1.0, most)  # round-off may go beyond


def quality_row(row, outcome, exact, score, gen_length):
    """A row of the quality table. exact: the Outcome of exact decoding in its order, or None.

    Both decoded the same problems, so they are compared problem by problem.
    """
    n = len(outcome.right)
    reused = 1 - statistics.mean(outcome.shares)
    only_it = only_exact = same_text = same_x_reused = None
    if exact is not None:
        pairs = list(zip(outcome.right, exact.right))
        only_it = pairs.count((True, False))
        only_exact = pairs.count((False, True))
        same_text = sum(map(str.__eq__, outcome.texts, exact.texts)) / n
        same_x_reused = same_text * reused
    return {
        "policy": row.policy,
        "order": row.order,
        score: sum(outcome.right) / n,
        "95 % interval": wilson_interval(sum(outcome.right), n),
        "strict": sum(outcome.strict) / n,
        "only it": only_it,
        "only exact": only_exact,
        "same text": same_text,
        "tokens per forward": gen_length / statistics.mean(outcome.forwards),
        "reused": reused,
        "same x reused": same_x_reused,
    }


def measure_quality(task, plan, batch):
    """Rows of the quality table. Every row starts from the same seed: some controls draw."""
    prompts = encode_problems(task)
    rows = []
    exact = {}  # Outcome by order
    total = len(plan) * len(prompts)
    with tqdm(total=total, desc="quality", unit="decode", disable=None) as progress:
        for row in plan:
            torch.manual_seed(0)
            outcome = solve(task, prompts, row.arguments, batch, progress)
            reference = exact.get(row.order)
            rows.append(quality_row(row, outcome, reference, task.score, task.gen_length))
            exact.setdefault(row.order, outcome)  # vanilla, the first row of each order

    if all(row["strict"] == row[task.score] for row in rows):
        for row in rows:
            del row["strict"]
    return rows


# ---- Speed ---------------------------------------------------------------------------------------


def random_model(config, device, dtype):
    """A model of random weights, those of queries and keys larger: attention is not uniform."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    random = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1)
        elif name == "wte.weight":
            weight.normal_(generator=random)
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            weight.normal_(std=gain / weight.shape[1] ** 0.5, generator=random)
    return model


def random_prompt(config, length, batch, device):
    """A prompt of random ids, (batch, length); those below EOS, so [MASK] is none of them."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(config.eos_token_id, (batch, length), generator=random).to(device)


def timed(function, *arguments):
    """Seconds that function(*arguments) takes, from an idle device to an idle one; its result."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*arguments)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def least_seconds(function, *arguments):
    """The shortest of five times that function(*arguments) takes, after a warm-up."""
    function(*arguments)
    return min(timed(function, *arguments)[0] for _ in range(5))


def machine_rates(device, dtype):
    """Bytes/s of a copy, read and written, and FLOP/s of a matrix product, as measured now."""
    n = 8192 if torch.device(device).type == "cuda" else 2048
    source = torch.randn(4 * n, n, device=device, dtype=dtype)
    target = torch.empty_like(source)
    square = source[:n]
    copy = least_seconds(target.copy_, source)
    product = least_seconds(torch.matmul, square, square)
    return 2 * source.nbytes / copy, 2 * n**3 / product


def floor_seconds(model, T, counts, rates):
    """The roofline of a pass, in the mean: the time to read all weights, or its arithmetic's.

    counts: of every pass, how many rows go through the layers, and how many through the head
    """
    config = model.config
    bandwidth, flops = rates
    in_layers = sum(weight.numel() for weight in model.blocks.parameters())
    in_head = model.wte.weight.numel()
    in_attention = 2 * config.n_layers * config.d_model * T  # of a row: query x key, weight x value
    reading = (in_layers + in_head) * model.wte.weight.element_size() / bandwidth
    seconds = []
    for rows, head_rows in counts:
        work = 2 * ((in_layers + in_attention) * rows + in_head * head_rows)
        seconds.append(max(reading, work / flops))
    return statistics.mean(seconds)


def ridge_rows(element_size, rates):
    """Rows of a step, in all sequences, at which its arithmetic takes as long as reading weights.

    A weight takes element_size / bandwidth to read, and 2 / FLOP/s of arithmetic for each row.
    Attention, which adds some arithmetic, is left out.
    """
    bandwidth, flops = rates
    return element_size / bandwidth * flops / 2


def row_counts(policy, states):
    """(rows through the layers, rows through the head) of every step, in all sequences.

    Through the head go those predicted. Of Dream a few of them were chosen only as the row before
    another, and did not: its floor is a little high.
    """
    counts = []
    for step, state in enumerate(states):
        in_layers = state.chosen
        if hasattr(policy, "recomputed"):  # a pass of its own, in shares of the layers
            in_layers = policy.recomputed[step]
        counts.append((in_layers.sum().item(), state.predicted.sum().item()))
    return counts


# What was measured of a row: whether it was replayed, or launched kernel by kernel; of each decode
# the mean seconds of a step; the share of positions recomputed; the floor, in seconds; bytes of GPU
# memory, None on a CPU.
Timing = namedtuple("Timing", "row replayed runs share floor peak")


def step_seconds(model, prompt, gen_length, arguments, steps):
    """Seconds that each of the first steps of a decode takes, and their states."""
    decoding = decode(model, prompt, gen_length, **arguments)
    timings = [timed(next, decoding) for _ in range(steps)]
    seconds, states = zip(*timings)
    return seconds, states


def time_row(model, prompt, gen_length, row, replayed, rates):
    """The Timing of a row, after a warm-up.

    On a GPU the warm-up is a decode: kernels are chosen, and graphs captured, when first used.
    """
    policy = row.arguments["policy"]
    steps = gen_length
    if isinstance(policy, RecomputeAll):
        steps = min(VANILLA_STEPS, gen_length)
    weight = model.wte.weight
    T = prompt.shape[1] + gen_length
    if prompt.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    arguments = row.arguments
    if replayed:
        cache = KVCache(model.config, len(prompt), T, weight.device, weight.dtype)
        arguments = arguments | {"policy": CudaGraphs(policy), "cache": cache}
    step_seconds(model, prompt, gen_length, arguments, steps if prompt.is_cuda else 1)
    runs = []
    spent = 0
    while len(runs) < RUNS and spent < LONG_RUN:
        seconds, states = step_seconds(model, prompt, gen_length, arguments, steps)
        runs.append(statistics.mean(seconds))
        spent += sum(seconds)

    share = work_done(policy, states)[1].mean().item()
    floor = floor_seconds(model, T, row_counts(policy, states), rates)
    peak = torch.cuda.max_memory_reserved() if prompt.is_cuda else None
    return Timing(row, replayed, runs, share, floor, peak)


def measure_speed(model, prompt, gen_length, plan, rates):
    """The Timing of every timed row; on a GPU launched kernel by kernel, and then replayed.

    But not replayed if the policy has a forward pass of its own.
    """
    ways = []
    for row in plan:
        if row.timed:
            ways.append((row, False))
            if prompt.is_cuda and not hasattr(row.arguments["policy"], "recompute"):
                ways.append((row, True))
    timings = []
    for row, replayed in tqdm(ways, desc="speed", unit="row", disable=None):
        timings.append(time_row(model, prompt, gen_length, row, replayed, rates))
    return timings


def speed_rows(timings, batch):
    """Rows of the speed table, at one token per step and sequence; speed-ups are over the first."""
    rows = []
    vanilla_step = statistics.median(timings[0].runs)
    for timing in timings:
        step = statistics.median(timing.runs)
        row = {
            "policy": timing.row.policy + (", replayed" if timing.replayed else ""),
            "order": timing.row.order,
            "reused": 1 - timing.share,
            "ms per step": 1000 * step,
            "tokens/s": batch / step,
            "speed-up": vanilla_step / step,
            "floor ms": 1000 * timing.floor,
            "x floor": step / timing.floor,
            "at best": vanilla_step / timing.floor,
            "peak GiB": None if timing.peak is None else timing.peak / 2**30,
            "runs": len(timing.runs),
        }
        rows.append(row)
    return rows


# ---- CUDA graphs ---------------------------------------------------------------------------------

# Kernels of attention, the fastest one first. model.py leaves cuDNN's off, as its planning takes 30
# ms for every new number of rows; a graph is captured once.
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class CudaGraphs:
    """A policy whose passes are replayed as CUDA graphs, one launch for the model's thousand.

        cache = KVCache(model.config, B, T, device, dtype)
        generate(model, prompt, gen_length, policy=CudaGraphs(policy), cache=cache)

    A graph fixes sizes and addresses. So Q and R are rounded up to multiples of `bucket` (more
    repeats change results by round-off at most), and each pair of sizes gets a graph of its own:

        Q 397, R 30  ->  sizes (416, 32): captured, replayed
        Q 411, R 29  ->  sizes (416, 32): replayed
        Q 420, R 28  ->  sizes (448, 32): captured, replayed
        another cache or model            all graphs are dropped

    Give every decode the same cache: graphs read and write the one that they were captured with.
    """

    def __init__(self, policy, bucket=32):
        self.policy = policy
        self.uses_attention = policy.uses_attention
        self.bucket = bucket
        self.drop_graphs(model=None, cache=None)

    def choose(self, state):
        return self.policy.choose(state)

    def recompute(self, model, cache, state, positions, valid, R):
        """What d2cache.recompute gives, for the same arguments."""
        if cache is not self.cache or model is not self.model:
            self.drop_graphs(model, cache)
        T = state.tokens.shape[1]
        if self.uses_attention and positions.shape[1] == T:  # too large to keep: maps of T x T
            return recompute(self.policy, model, cache, state, positions, valid, R)

        positions, valid, rows = self.round_up(positions, valid, R, T)
        inputs = [state.tokens, positions, valid]
        if state.padding is not None:
            inputs.append(state.padding)
        sizes = (positions.shape[1], rows, len(inputs))
        if sizes not in self.graphs:
            self.graphs[sizes] = self.capture(state, inputs, rows)
        graph, own_inputs, (logits, influence) = self.graphs[sizes]

        for own, value in zip(own_inputs, inputs):
            own.copy_(value)
        graph.replay()
        if influence is not None:
            influence = influence.clone()  # a state keeps it, and the next replay overwrites it
        return logits[:, :R], influence

    def drop_graphs(self, model, cache):
        """Forget all that was captured, and capture for these from now on."""
        self.model = model
        self.cache = cache
        self.graphs = {}
        self.pool = None  # the graphs' memory

    def round_up(self, positions, valid, R, T):
        """What `pack` gives and R, for the sizes of a graph."""
        Q = positions.shape[1]
        larger_Q = min(T, math.ceil(Q / self.bucket) * self.bucket)
        larger_R = min(T, math.ceil(R / self.bucket) * self.bucket)
        repeats = positions[:, :1].expand(-1, larger_Q - Q)
        positions = torch.cat([positions, repeats], dim=1)
        return positions, F.pad(valid, (0, larger_Q - Q)), larger_R

    def capture(self, state, inputs, rows):
        """A graph, the tensors that it reads, and those in which a replay leaves its results."""
        own_inputs = [value.clone() for value in inputs]
        tokens, positions, valid, *padding = own_inputs
        state = replace(state, tokens=tokens, padding=padding[0] if padding else None)
        arguments = (self.policy, self.model, self.cache, state, positions, valid, rows)
        graph, outputs = self.graph_of(partial(recompute, *arguments))
        return graph, own_inputs, outputs

    def graph_of(self, run):
        """A graph of what run() launches, and the tensors in which a replay leaves its results."""
        graph = torch.cuda.CUDAGraph()
        # Sharing memory is safe: the results of one graph are read, or copied, before the next.
        device = self.model.wte.weight.device
        with torch.cuda.device(device), sdpa_kernel(FASTEST_FIRST, set_priority=True):
            run()  # what kernels do when they are first used cannot be captured
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = run()
        self.pool = graph.pool()
        return graph, outputs


# ---- The command line ----------------------------------------------------------------------------


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="checkpoint folder or hub id instead of the embedded models")
    add("--revision", help="of the hub's repository: branch, tag or commit")
    add("--dtype", choices=DTYPES, help="instead of the checkpoint's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")

    add = parser.add_argument_group("quality").add_argument
    add("--world", choices=WORLDS, help="of this embedded model alone, and no speed")
    add("--data", help="JSON lines to score, as GSM8K or MBPP has them")
    add("--problems", type=int, default=12, help="so many in each table (12)")
    add("--fresh", type=int, help="of the worlds: problems drawn anew with this seed")
    add("--shots", type=int, default=0, help="so many pairs before them are worked examples (0)")
    add("--run-code", action="store_true", help="MBPP: EXECUTE HERE what the model wrote")

    add = parser.add_argument_group("speed").add_argument
    add("--prompt", help="with --model: the text to time")
    add("--prompt-length", type=int, help="without --model: tokens of the random prompt")

    add = parser.add_argument_group("both").add_argument
    add("--gen-length", type=int, help="tokens to decode; embedded models keep their own length")
    add("--batch", type=int, help="sequences decoded at once")
    add("--policy", help="FILE.py:Name or FILE.py:Name(k=8), to be compared with the others")
    add("--json", help="write the same numbers, and how they were measured, to this file")
    return parser


def check(args):
    """ValueError, in a line, for arguments that cannot be meant; before any work."""
    require_device(args.device, torch.float32)
    least = {"problems": 1, "shots": 0, "fresh": 0, "prompt_length": 1, "gen_length": 2, "batch": 1}
    for flag, lowest in least.items():
        value = getattr(args, flag)
        fault = f"--{flag.replace('_', '-')} is {value}, should be at least {lowest}"
        require(value is None or value >= lowest, fault)

    fault = "--fresh and --world are of the embedded models, without --model"
    no_world = args.fresh is None and args.world is None
    require(no_world or not args.model, fault)
    needs = {"revision": "model", "prompt": "model", "data": "model"}
    needs |= {"shots": "data", "run_code": "data"}
    for flag, other in needs.items():
        fault = f"--{flag.replace('_', '-')} needs --{other}"
        require(getattr(args, other) or not getattr(args, flag), fault)
    fault = "--prompt-length is of a random prompt, --model takes --prompt"
    require(not args.model or args.prompt_length is None, fault)
    fault = "--run-code needs Linux: its limit on memory was tried there"
    require(not args.run_code or sys.platform == "linux", fault)

    if args.json:
        open(args.json, "a").close()  # an OSError says why it cannot be written


def read_data(args):
    """Problems of --data, who judges them, and the name of the score, as fields of a Task."""
    grader = load_module(GRADER)
    problems = grader.read_problems(args.data, args.shots, args.problems)
    is_code = grader.runs_code(problems)
    fault = f"{args.data} asks for programs: to score them is to execute what the model writes here"
    require(args.run_code or not is_code, f"{fault}; --run-code does it")
    require(is_code or not args.run_code, f"--run-code: {args.data} asks for no programs")
    score = "pass@1" if is_code else "exact match"
    return {"problems": problems, "is_right": grader.is_right, "score": score}


def world_task(name, n, fresh=None, device="cpu", dtype=None):
    """An embedded model, and n problems of its world, of the seed for tests or `fresh`."""
    folder = WORLDS[name]
    world = load_module(folder / "problems.py")

    def is_right(problem, text):
        right = world.is_right(problem.question, text)
        return right, right  # there is no stricter score

    seed = world.TEST_SEED if fresh is None else fresh
    problems = []
    for number, (question, answer) in enumerate(world.draw_problems(seed)[:n], 1):
        problems.append(Problem(f"{name}, problem {number}", question, question, answer))
    model = Transformer.from_pretrained(folder, device, dtype)
    tokenizer = load_tokenizer(folder)
    return Task(name, model, tokenizer, world.RESPONSE_LENGTH, problems, is_right)


def report_quality(args, task, own):
    """The quality table of a task."""
    gen_length = task.gen_length
    batch = args.batch or (1 if args.model else 32)  # of a large model, memory may hold one
    settings = {"problems": len(task.problems), "response": gen_length}
    settings["block length"] = paper_block_length(gen_length)
    if args.fresh is not None:
        settings["fresh, of seed"] = args.fresh
    ours = {"d2Cache": paper_settings(gen_length)["d2cache"]["policy"]}
    settings |= {name: str(policy) for name, policy in (ours | own).items()}
    rows = measure_quality(task, make_plan(gen_length, own), batch)
    return report("quality", facts_of(task.name, task.model), settings, rows, {})


def report_worlds(args, own):
    """The quality tables of all embedded worlds, or of the one named."""
    for name in [args.world] if args.world else WORLDS:
        task = world_task(name, args.problems, args.fresh, args.device, args.dtype)
        yield report_quality(args, task, own)


def report_speed(args, name, model, prompt, gen_length, own):
    """The speed table of one prompt."""
    settings = {
        "prompt": prompt.shape[1],
        "response": gen_length,
        "batch": len(prompt),
        "block length": paper_block_length(gen_length),
    }
    weight = model.wte.weight
    rates = machine_rates(weight.device, weight.dtype)
    plan = make_plan(gen_length, own)
    timings = measure_speed(model, prompt, gen_length, plan, rates)
    notes = {
        "copy GB/s": rates[0] / 1e9,
        "matrix TFLOP/s": rates[1] / 1e12,
        "ridge rows": ridge_rows(weight.element_size(), rates),
    }
    rows = speed_rows(timings, len(prompt))
    return report("speed", facts_of(name, model), settings, rows, notes)


def race_of(args):
    """What to time without a checkpoint, and what to say of it."""
    on_gpu = torch.device(args.device).type == "cuda"
    race = CPU_RACE
    if on_gpu and torch.cuda.mem_get_info(args.device)[0] > LLADA_8B_BYTES:
        race = LLADA_8B_RACE
    name = f"random weights, {race.config.n_layers} layers of {race.config.d_model}"
    if on_gpu and race is CPU_RACE:
        name += f" (LLaDA-8B's shape wants {LLADA_8B_BYTES / 1e9:.0f} GB of free GPU memory)"

    race = race._replace(
        dtype=DTYPES.get(args.dtype, race.dtype),
        gen_length=args.gen_length or race.gen_length,
        batch=args.batch or race.batch,
    )
    if args.prompt_length:
        race = race._replace(prompts=(args.prompt_length,))
    return race, name


def report_race(race, name, args, own):
    """The speed tables of random weights."""
    model = random_model(race.config, args.device, race.dtype)
    for length in race.prompts:
        prompt = random_prompt(race.config, length, race.batch, args.device)
        yield report_speed(args, name, model, prompt, race.gen_length, own)


def report_checkpoint(args, own):
    """A checkpoint's score on --data, and its speed."""
    data = read_data(args) if args.data else {}
    gen_length = args.gen_length or 256
    tokenizer = load_tokenizer(args.model, args.revision)
    prompt = encode_prompt(tokenizer, args.prompt or EXAMPLE)
    model = Transformer.from_pretrained(args.model, args.device, args.dtype, args.revision)
    task = Task(args.model, model, tokenizer, gen_length, **data)
    if data:
        yield report_quality(args, task, own)
    prompt = prompt.to(args.device).repeat(args.batch or 1, 1)
    yield report_speed(args, task.name, model, prompt, gen_length, own)


def reports(args):
    """All that the command line asks for, one by one: (kind, text to print, numbers to write)."""
    check(args)
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # `timed` and the peak of memory are of the current one
    own = {}
    if args.policy:
        own[args.policy.partition(".py:")[2]] = load_policy(args.policy)
    if args.model:
        yield from report_checkpoint(args, own)
    else:
        yield from report_worlds(args, own)
        if args.world is None:
            race, name = race_of(args)
            yield from report_race(race, name, args, own)


def run_record(args):
    """How the numbers came about. Where there is no git or no driver, why not."""
    git = f'git --git-dir="{ROOT}/.git" --work-tree="{ROOT}" describe "--exclude=*"'
    nvidia = "nvidia-smi --query-gpu=driver_version"
    return {
        "arguments": vars(args),
        "commit": subprocess.getoutput(f"{git} --always --dirty --abbrev=40"),
        "torch": torch.__version__,
        "driver": subprocess.getoutput(f"{nvidia} --format=csv,noheader"),
        "device": device_name(args.device),
    }


def run(args):
    """Print every table when it is there, and write all of them to the file of --json."""
    numbers = {}
    for kind, text, table in reports(args):
        numbers.setdefault(kind, []).append(table)
        print(text, flush=True)
    if args.json:
        written = json.dumps({"run": run_record(args)} | numbers, indent=2) + "\n"
        Path(args.json).write_text(written, encoding="utf-8")


def main():
    """Quality and speed of every policy, as tables; progress goes to stderr."""
    run_program(make_parser(), run)


if __name__ == "__main__":
    main()

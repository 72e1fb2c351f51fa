"""Quality and speed of every policy, as two tables: `python bench.py`.

Quality: the embedded model solves word problems it has not seen. Score, agreement with exact
decoding in the same order, and how many positions were recomputed for it; with two controls that
cost the same and replace one stage of d2Cache by chance. Speed: random weights at a size that suits
the device, beside the floor: the time that reading the weights or the arithmetic takes at the rates
measured here. With --model, the speed of a real checkpoint, and with --data too, its score.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from d2cache import EMBEDDED_MODEL, EXAMPLE, D2Cache, ask, attention_rollout, best
from d2cache import certainty_prior, generate, pack, predict, recompute, settings
from model import Config, KVCache, Transformer, decode_response, encode_prompt
from model import load_tokenizer, require

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F
from huggingface_hub.utils import tqdm

RUNS, LONG_RUN = 3, 5.0  # time so many decodes, but only one if it takes longer (seconds)
QUALITY_LENGTH = 64  # the response for which the embedded model is trained
PROBLEMS = EMBEDDED_MODEL / "problems.jsonl"

QUALITY = ("policy", "exact match", "same text", "forwards", "recomputed")
SPEED = ("policy", "forwards", "recomputed", "ms per step", "tokens/s", "speed-up")
SPEED += ("floor ms", "x floor", "peak GiB", "runs")
PERCENT = ("exact match", "same text", "recomputed")

LLADA_8B_SHAPE = Config(
    d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288,
    vocab_size=126464, embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0,
    rms_norm_eps=1e-5, mask_token_id=126336, eos_token_id=126081,
)  # fmt: skip
CPU_SHAPE = replace(  # an eighth as wide and a quarter as deep
    LLADA_8B_SHAPE, d_model=512, n_layers=8, n_heads=4, n_kv_heads=4, mlp_hidden_size=1536,
    vocab_size=15808, embedding_size=15808, mask_token_id=15792, eos_token_id=15760,
)  # fmt: skip
LLADA_8B_BYTES = 22e9  # weights 16 GB, cache 2.1, the first step's maps 2.1, and what is fleeting


class CudaGraphs:
    """Replays `recompute` as CUDA graphs: one launch for the model's thousand.

    A graph fixes sizes and addresses. So Q and R are rounded up to multiples of `bucket` (more
    repeats change results by round-off at most), each pair gets a graph when it first occurs, and
    all decodes of one shape share a cache, which stays as long as this object.
    """

    def __init__(self, model, bucket=32):
        self.model, self.bucket = model, bucket
        self.caches, self.graphs, self.pool = {}, {}, None

    def round_up(self, positions, valid, R, T):
        """What `pack` gives, for the sizes of a graph."""
        Q, R = (min(T, math.ceil(n / self.bucket) * self.bucket) for n in (positions.shape[1], R))
        more = Q - positions.shape[1]
        repeats = positions[:, :1].expand(-1, more)
        return torch.cat([positions, repeats], dim=1), F.pad(valid, (0, more)), R

    def cache(self, B, T):
        if (B, T) not in self.caches:
            weight, config = self.model.wte.weight, self.model.config
            self.caches[B, T] = KVCache(config, B, T, weight.device, weight.dtype)
        return self.caches[B, T]

    def recompute(self, model, cache, R, uses_attention, tokens, positions, valid, padding):
        (B, Q), T = positions.shape, tokens.shape[1]
        if uses_attention and Q == T:  # a graph would keep its T x T maps
            return recompute(model, cache, R, uses_attention, tokens, positions, valid, padding)
        positions, valid, rows = self.round_up(positions, valid, R, T)
        inputs = [x for x in (tokens, positions, valid, padding) if x is not None]
        kind = (B, T, positions.shape[1], rows, uses_attention, len(inputs))
        if kind not in self.graphs:
            own = [tensor.clone() for tensor in inputs]
            run = partial(recompute, model, cache, rows, uses_attention, *own)
            self.graphs[kind] = own, *self.capture(run)
        own, graph, outputs = self.graphs[kind]
        for tensor, value in zip(own, inputs):
            tensor.copy_(value)
        graph.replay()
        logits, influence = outputs
        return logits[:, :R], influence

    def capture(self, run):
        """A graph of what run() launches, and the tensors that a replay leaves its results in."""
        graph, device = torch.cuda.CUDAGraph(), self.model.wte.weight.device
        # Sharing memory is safe: the results of one graph are used up before the next is replayed.
        with torch.cuda.device(device):
            run()  # what kernels do when they are first used cannot be captured
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = run()
        self.pool = graph.pool()
        return graph, outputs


class RandomStage1(D2Cache):
    """Control: as many masked positions as d2Cache takes, but any."""

    def about_to_be_decoded(self, state):
        return best(torch.rand_like(state.confidence), state.masked, self.k)


class RandomStage2(D2Cache):
    """Control: as many known positions as d2Cache takes, but any."""

    def attended(self, state):
        n = super().attended(state).sum(dim=1, keepdim=True)
        return best(torch.rand_like(state.confidence), state.known, n)


def quality_rows(gen_length):
    """(name, arguments of `generate`); every exact decoding comes before those that imitate it."""
    ours = settings(gen_length)
    d2cache, blocks = ours["d2cache"], {"block_length": ours["dual"]["block_length"]}
    k, p, sigma = d2cache["policy"].k, d2cache["policy"].p, d2cache["sigma"]
    prior = {"sigma": sigma}
    return [
        ("vanilla, by confidence", {}),
        ("vanilla, in blocks", blocks),
        ("vanilla, by certainty prior", prior),
        ("prefix cache, in blocks", ours["prefix"]),
        ("dual cache, in blocks", ours["dual"]),
        ("d2Cache", d2cache),
        ("  with stage 1 at random", prior | {"policy": RandomStage1(k, p, sigma)}),
        ("  with stage 2 at random", prior | {"policy": RandomStage2(k, p, sigma)}),
        ("vanilla, threshold 0.9", prior | {"threshold": 0.9}),
        ("d2Cache, threshold 0.9", d2cache | {"threshold": 0.9}),
        ("vanilla, threshold 0.6", prior | {"threshold": 0.6}),
        ("d2Cache, threshold 0.6", d2cache | {"threshold": 0.6}),
    ]


def read_problems(path, n):
    """The first n (question, answer) pairs of a JSON-lines file; ValueError names a bad line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:n]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            problem = json.loads(line)
            question, answer = problem["question"], problem["answer"]
        except (ValueError, KeyError, TypeError) as error:
            shape = '{"question": ..., "answer": ...}'
            raise ValueError(f"{path}, line {number}: should be {shape}") from error
        said = f"{path}, line {number}: the answer is {answer!r}, should end in #### and a number"
        require(final_number(answer) is not None, said)
        problems.append((question, answer))
    require(problems, f"{path}: holds no problems")
    return problems


def final_number(text):
    """The number after "####", GSM8K's mark of the answer, else the last one; None without any."""
    before, mark, after = text.partition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", after if mark else before)
    return numbers[0 if mark else -1].replace(",", "") if numbers else None


def decode(model, prompt, gen_length, arguments):
    """Tokens on the host, and the (state, chosen) of every step."""
    steps = []
    arguments = arguments | {"on_step": lambda state, chosen: steps.append((state, chosen))}
    return generate(model, prompt, gen_length, **arguments).cpu(), steps


def solve(model, tokenizer, questions, gen_length, arguments, progress):
    """Texts of the responses, forwards of a decode, and the share of positions recomputed.

    Neighbours with prompts of equal length decode as one batch.
    """
    texts, forwards, shares = [], [], []
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    for length, same_length in itertools.groupby(prompts, key=lambda prompt: prompt.shape[1]):
        tokens, steps = decode(model, torch.cat(list(same_length)), gen_length, arguments)
        for response in tokens[:, length:]:
            texts.append(decode_response(tokenizer, response, model.config.eos_token_id))
        chosen = torch.stack([chosen for _, chosen in steps])  # (S, B, T)
        own = chosen.any(dim=2).sum(dim=0)  # steps in which a sequence did not wait for others
        forwards += own.tolist()
        shares += (chosen.float().mean(dim=2).sum(dim=0) / own).tolist()
        progress.update(len(tokens))
    return texts, statistics.mean(forwards), statistics.mean(shares)


def measure_quality(model, tokenizer, problems, gen_length):
    """Rows of the quality table, dicts by column; and d2Cache's answer to the first problem."""
    questions, answers = zip(*problems)
    numbers = [final_number(answer) for answer in answers]
    rows, exact, sample, plan = [], {}, None, quality_rows(gen_length)
    with tqdm(total=len(plan) * len(problems), desc="quality", unit="decode") as progress:
        for name, arguments in plan:
            torch.manual_seed(0)  # of the controls
            texts, *work = solve(model, tokenizer, questions, gen_length, arguments, progress)
            order = tuple(arguments.get(key) for key in ("block_length", "sigma", "threshold"))
            reference = exact.setdefault(order, texts)  # vanilla comes first in every order
            right = [final_number(text) == number for text, number in zip(texts, numbers)]
            same = [text == other for text, other in zip(texts, reference)]
            agreement = None if texts is reference else statistics.mean(same)
            sample = texts[0] if name == "d2Cache" else sample
            rows.append(dict(zip(QUALITY, (name, statistics.mean(right), agreement, *work))))
    return rows, sample


def random_model(config, device, dtype):
    """A model of random weights under which attention is neither uniform nor one-hot."""
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


def timed(function):
    """Seconds that function() takes, from an idle device to an idle one, and its result."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def least_seconds(function, repeats=10):
    """The shortest time that a function took, after a warm-up."""
    function()
    return min(timed(function)[0] for _ in range(repeats))


def machine_rates(device, dtype):
    """Bytes/s of a copy, read and written, and FLOP/s of a matrix product, as measured now."""
    n = 8192 if device.startswith("cuda") else 2048
    source = torch.randn(4 * n, n, device=device, dtype=dtype)
    target, square = torch.empty_like(source), source[:n]
    copy = least_seconds(lambda: target.copy_(source))
    product = least_seconds(lambda: square @ square)
    return 2 * source.nbytes / copy, 2 * n**3 / product


def floor_seconds(model, steps, rates):
    """Mean over steps of the least each can take: to read all weights, or for the arithmetic."""
    config, (bandwidth, flops), T = model.config, rates, steps[0][1].shape[1]
    in_blocks = sum(weight.numel() for weight in model.blocks.parameters())
    in_head = model.wte.weight.numel()
    in_attention = 2 * config.n_layers * config.d_model * T  # query x key, weight x value
    read = (in_blocks + in_head) * model.wte.weight.element_size()
    seconds = []
    for state, chosen in steps:
        masked = chosen & (state.masked | state.fresh)  # before this step's commit
        Q, R = chosen.sum().item(), masked.sum().item()
        work = 2 * ((in_blocks + in_attention) * Q + in_head * R)
        seconds.append(max(read / bandwidth, work / flops))
    return statistics.mean(seconds)


def time_decode(model, prompt, gen_length, arguments):
    """Seconds of each timed decode, and its steps; on a GPU as replays, captured beforehand."""
    if prompt.is_cuda:
        arguments = arguments | {"graphs": CudaGraphs(model)}
        torch.cuda.reset_peak_memory_stats()
        decode(model, prompt, gen_length, arguments)
    again = partial(decode, model, prompt, gen_length, arguments)
    seconds, (_, steps) = timed(again)
    times = [seconds]
    while len(times) < RUNS and seconds < LONG_RUN:
        times.append(timed(again)[0])
    return times, steps


def measure_speed(model, prompt, gen_length, rates):
    """Rows of the speed table, dicts by column; and the steps of d2Cache's decode.

    Vanilla's steps are all alike: where they are slow, it commits four tokens in each, so that a
    quarter of them is timed. Its row is that of one token per step.
    """
    rows, one_step = [], {"tokens_per_step": gen_length}
    warm_up = partial(decode, model, prompt, gen_length, one_step)
    slow = gen_length * least_seconds(warm_up, repeats=1) > 2 * LONG_RUN
    for name, arguments in tqdm(settings(gen_length).items(), desc="speed", unit="policy"):
        quarter = {"tokens_per_step": 4} if name == "vanilla" and slow else {}
        times, steps = time_decode(model, prompt, gen_length, arguments | quarter)
        step, floor = statistics.median(times) / len(steps), floor_seconds(model, steps, rates)
        share = torch.stack([chosen for _, chosen in steps]).float().mean().item()
        rate = len(prompt) / step
        gain = rate / (rows[0]["tokens/s"] if rows else rate)
        peak = torch.cuda.max_memory_allocated() / 2**30 if prompt.is_cuda else None
        work = name, gen_length, share, 1000 * step, rate, gain
        rows.append(dict(zip(SPEED, (*work, 1000 * floor, step / floor, peak, len(times)))))
    return rows, steps


def measure_parts(model, gen_length, steps):
    """Milliseconds that the parts of a d2Cache step take, half-way through, each timed alone.

    On a GPU the model's parts as replays. What a step takes beyond their sum are the commit, gaps
    between launches, and its part of the first step, which recomputes everything.
    """
    policy, (state, _) = settings(gen_length)["d2cache"]["policy"], steps[len(steps) // 2]
    chosen, predicted = ask(policy, state, model.config.shifted)
    graphs, (positions, valid, R) = CudaGraphs(model), pack(chosen, predicted)
    if chosen.is_cuda:
        positions, valid, R = graphs.round_up(positions, valid, R, chosen.shape[1])
    cache = graphs.cache(*chosen.shape)
    hidden, maps = model.trunk(state.tokens, positions, cache, return_attention=True)

    def select():
        attention_rollout(maps, positions, valid)
        certainty_prior(state.confidence, state.known, policy.sigma)  # once more, for the commit
        pack(*ask(policy, state, model.config.shifted))

    parts = {
        "forward": lambda: model.trunk(state.tokens, positions, cache),
        "with maps": lambda: model.trunk(state.tokens, positions, cache, return_attention=True),
        "head": lambda: predict(model.head(hidden[:, :R]), model.config),
        "selection": select,
    }
    times = {}
    for name, part in parts.items():
        replayed = chosen.is_cuda and part is not select  # selection is launched kernel by kernel
        function = graphs.capture(part)[0].replay if replayed else part
        times[name] = 1000 * least_seconds(function, repeats=5)
    maps_time = max(0.0, times.pop("with maps") - times["forward"])
    return times | {"attention maps": maps_time}


def cell(column, value):
    """A value as the tables print it; "-" where it was not measured."""
    if value is None:
        return "-"
    if column in PERCENT:
        return f"{value:.1%}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_table(rows):
    """Aligned columns: the first one left, the numbers right."""
    table = [list(rows[0])] + [[cell(*item) for item in row.items()] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(*table)]
    for first, *rest in table:
        print("  ".join([first.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:])]))


def describe(model):
    """Size, precision and device, for a table's header."""
    weight, millions = model.wte.weight, sum(p.numel() for p in model.parameters()) / 1e6
    cpu = f"CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else cpu
    return f"{millions:,.1f} M parameters, {weight.dtype}, {device}, torch {torch.__version__}"


def report_quality(name, model, tokenizer, problems, gen_length):
    """Print a sample and the quality table; the same as a dict."""
    rows, sample = measure_quality(model, tokenizer, problems, gen_length)
    block_length = settings(gen_length)["dual"]["block_length"]
    print(f"A problem   {problems[0][0]}\nd2Cache     {sample}\nThe answer  {problems[0][1]}\n")
    print(f"QUALITY  {name}: {describe(model)}")
    print(
        f"{len(problems)} problems, response {gen_length}, blocks of {block_length}, 1 token per "
        "step or all over the threshold, 1 run; same text: as exact decoding in the same order"
    )
    print_table(rows)
    return {"model": f"{name}: {describe(model)}", "problems": len(problems), "rows": rows}


def report_speed(name, model, prompt, gen_length, rates):
    """Print the speed table of one prompt, and where a step of d2Cache goes; the same as a dict."""
    rows, steps = measure_speed(model, prompt, gen_length, rates)
    parts = measure_parts(model, gen_length, steps)
    parts["the rest"] = rows[-1]["ms per step"] - sum(parts.values())
    (B, P), block_length = prompt.shape, settings(gen_length)["dual"]["block_length"]
    print(f"\nSPEED  {name}: {describe(model)}")
    print(
        f"prompt {P}, response {gen_length}, batch {B}, caches in blocks of {block_length}, 1 token"
        " per step, median of the runs; a slow vanilla: a quarter of its steps"
    )
    print_table(rows)
    print("a step of d2cache:", ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items()))
    sizes = {"prompt": P, "response": gen_length, "batch": B}
    return (
        {"model": f"{name}: {describe(model)}"} | sizes | {"rows": rows, "d2cache step ms": parts}
    )


def speed_model(args):
    """(name, model, prompts, gen_length) for the speed tables without a checkpoint.

    On a CPU four sequences at once: one alone leaves small matrices, and waits for the memory.
    """
    gpu = args.device.startswith("cuda")
    fits = gpu and torch.cuda.mem_get_info(args.device)[0] > LLADA_8B_BYTES
    config, dtype = (LLADA_8B_SHAPE, torch.bfloat16) if fits else (CPU_SHAPE, torch.float32)
    name = f"random weights, {config.n_layers} layers of {config.d_model}"
    if gpu and not fits:
        name += f" (LLaDA-8B's shape wants {LLADA_8B_BYTES / 1e9:.0f} GB of free GPU memory)"
    usual = [128, 896, 3840] if fits else [384]
    lengths, batch = [args.prompt_length] if args.prompt_length else usual, 1 if fits else 4
    random, shapes = torch.Generator().manual_seed(0), [(args.batch or batch, n) for n in lengths]
    prompts = [torch.randint(config.eos_token_id, shape, generator=random) for shape in shapes]
    model = random_model(config, args.device, dtype)
    gen_length = args.gen_length or (256 if fits else 64)
    return name, model, [prompt.to(args.device) for prompt in prompts], gen_length


def checkpoint(args):
    """(name, model, prompts, gen_length) for the speed table of --model; prints its answer."""
    tokenizer = load_tokenizer(args.model)
    model = Transformer.from_pretrained(args.model, args.device)
    prompt, gen_length = encode_prompt(tokenizer, args.prompt), args.gen_length or 256
    tokens, _ = decode(model, prompt, gen_length, settings(gen_length)["d2cache"])
    answer = decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.eos_token_id)
    print(f"A prompt    {args.prompt}\nd2Cache     {answer}\n")
    return args.model, model, [prompt.to(args.device).repeat(args.batch or 1, 1)], gen_length


def report(args):
    """Everything the command line asks for, printed; the same as a dict."""
    for flag in ("problems", "prompt_length", "gen_length", "batch"):
        value, name = getattr(args, flag), flag.replace("_", "-")
        require(value is None or value >= 1, f"--{name} is {value}, should be at least 1")
    result, folder = {}, Path(args.json or "here").resolve().parent
    require(folder.is_dir(), f"--json {args.json}: there is no folder {folder}")
    if args.data or not args.model:
        source, name = args.model or EMBEDDED_MODEL, args.model or "the embedded model"
        problems = read_problems(args.data or PROBLEMS, args.problems)
        tokenizer, model = load_tokenizer(source), Transformer.from_pretrained(source, args.device)
        gen_length = (args.gen_length or 256) if args.model else QUALITY_LENGTH
        result["quality"] = report_quality(name, model, tokenizer, problems, gen_length)
        del model  # two copies of 16 GB would not fit everywhere
    name, model, prompts, gen_length = checkpoint(args) if args.model else speed_model(args)
    if model.wte.weight.is_cuda:
        torch.cuda.set_device(model.wte.weight.device)  # the one to wait for and to measure
    rates = machine_rates(args.device, model.wte.weight.dtype)
    speed = [report_speed(name, model, prompt, gen_length, rates) for prompt in prompts]
    bandwidth, flops = rates
    print(
        f"floor: {bandwidth / 1e9:,.0f} GB/s (copy), {flops / 1e12:,.2f} TFLOP/s (matrix product)"
    )
    return result | {"copy bytes/s": bandwidth, "matrix FLOP/s": flops, "speed": speed}


def main():
    """Quality and speed of every policy, as tables; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", help="checkpoint folder or hub id instead of the embedded model")
    add("--prompt", default=EXAMPLE, help="with --model: the text to answer and to time")
    add("--data", help='JSON lines {"question", "answer"} to score; answers end in "#### n"')
    add("--problems", type=int, default=32, help="how many of them (32)")
    add("--prompt-length", type=int, help="of the speed table's random prompt")
    add("--gen-length", type=int, help="tokens to decode, in the speed table and with --model")
    add("--batch", type=int, help="sequences decoded at once in the speed table")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--json", help="write the same numbers to this file")
    args = parser.parse_args()
    try:
        result = report(args)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the guests solve, recompute and refresh: `python tests/guests/measure.py`.

On the embedded model's problems. Beside them stands the sliding window of the same width: it is an
Elastic-Cache that watches nothing and never refreshes.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where bench.py and d2cache.py are

from bench import QUALITY_LENGTH, is_right, left_padded, read_problems  # noqa: E402
from bench import standard_error  # noqa: E402
from d2cache import EMBEDDED_MODEL, SlidingWindow, decode, settings  # noqa: E402
from dllm_cache import DLLMCache  # noqa: E402
from elastic_cache import ElasticCache  # noqa: E402
from model import Transformer, decode_response, encode_prompt, load_tokenizer  # noqa: E402

import torch  # noqa: E402  (after model, which keeps its import quiet)

WIDTH = 8  # an eighth of the response, as the k of d2Cache here
BATCH = 25


def rows(gen_length):
    """(name, arguments of `decode`)."""
    ours = settings(gen_length)
    blocks = {"block_length": ours["dual"]["block_length"]}
    found = [
        ("d2Cache, by prior", ours["d2cache"]),
        (f"sliding window of {WIDTH}", {"policy": SlidingWindow(WIDTH)}),
        ("Elastic-Cache, never", {"policy": ElasticCache(WIDTH, gamma=-1.0)}),
    ]
    for gamma in (0.9, 0.95, 0.99):
        found.append((f"Elastic-Cache, {gamma}", {"policy": ElasticCache(WIDTH, gamma)}))
    paper = ElasticCache(WIDTH, 0.9, over="keys")
    found.append(("Elastic-Cache, 0.9, over keys", {"policy": paper}))
    found.append(("Elastic-Cache, always", {"policy": ElasticCache(WIDTH, gamma=2.0)}))
    found.append(("dLLM-Cache, in blocks", blocks | {"policy": DLLMCache()}))
    return found


def watch(model, prompt, mask, policy, arguments):
    """A batch decoded: tokens (B, T), share recomputed (B,), and refreshes (B,), 0 if it has none.

    A drift in the last layer comes too late to refresh anything.
    """
    positions = mask.sum(dim=1) + QUALITY_LENGTH  # (B,)
    chosen = []
    refreshes = torch.zeros(len(prompt))
    arguments = arguments | {"prompt_mask": mask, "policy": policy}
    for state in decode(model, prompt, QUALITY_LENGTH, **arguments):
        chosen.append(state.chosen)
        if isinstance(policy, ElasticCache):
            refreshes += (policy.similarity[:-1] < policy.gamma).any(dim=0)
    recomputed = torch.stack(getattr(policy, "recomputed", chosen)).float()  # (S, B, T)
    return state.tokens, recomputed.sum(dim=2).mean(dim=0) / positions, refreshes


def measure(model, tokenizer, problems, arguments):
    """Exact match, share recomputed and refreshes of a decode, as means over the problems."""
    settings = {name: value for name, value in arguments.items() if name != "policy"}
    right = []
    shares = []
    refreshes = []
    for start in range(0, len(problems), BATCH):
        questions, answers = zip(*problems[start : start + BATCH])
        prompts = [encode_prompt(tokenizer, question)[0] for question in questions]
        prompt, mask = left_padded(prompts)
        tokens, share, fired = watch(model, prompt, mask, arguments["policy"], settings)
        for response, answer in zip(tokens[:, prompt.shape[1] :], answers):
            text = decode_response(tokenizer, response, model.config.end_ids)
            right.append(is_right(text, answer)[0])
        shares += share.tolist()
        refreshes += fired.tolist()
    return statistics.mean(right), statistics.mean(shares), statistics.mean(refreshes)


def main():
    """Print a row for each guest and for what it is compared with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default=EMBEDDED_MODEL, type=Path, help="with problems.jsonl")
    parser.add_argument("--problems", default=200, type=int, help="how many (200)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are small
    model = Transformer.from_pretrained(args.model)
    tokenizer = load_tokenizer(args.model)
    problems = read_problems(args.model / "problems.jsonl", args.problems)
    print(f"{len(problems)} problems, {QUALITY_LENGTH} steps a decode")
    print(f"{'policy':32}{'exact match':>20}{'recomputed':>12}{'refreshes a decode':>20}")
    for name, arguments in rows(QUALITY_LENGTH):
        right, share, fired = measure(model, tokenizer, problems, arguments)
        score = f"{right:.1%} +- {standard_error(right, len(problems)):.1%}"
        print(f"{name:32}{score:>20}{share:>12.1%}{fired:>20.2f}", flush=True)


if __name__ == "__main__":
    main()

"""What the guests solve, recompute and refresh: `python tests/guests/measure.py`.

On the embedded model's problems. Beside them stands the sliding window of the same width: it is an
Elastic-Cache that watches nothing and never refreshes.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where bench.py and d2cache.py are

from bench import Task, encode_problems, left_padded, read_world, table_text  # noqa: E402
from bench import wilson_interval, work_done  # noqa: E402
from d2cache import EMBEDDED_MODEL, SlidingWindow, decode, paper_settings  # noqa: E402
from dllm_cache import DLLMCache  # noqa: E402
from elastic_cache import ElasticCache  # noqa: E402
from model import Transformer, decode_response, load_tokenizer  # noqa: E402

import torch  # noqa: E402  (after model, which keeps its import quiet)

WIDTH = 8  # an eighth of the response, as the k of d2Cache here
BATCH = 25


def rows(gen_length):
    """(name, arguments of `decode`)."""
    ours = paper_settings(gen_length)
    confidence = {"sigma": None}
    found = [
        ("d2Cache, by prior", ours["d2cache"]),
        (f"sliding window of {WIDTH}", confidence | {"policy": SlidingWindow(WIDTH)}),
    ]
    for name, gamma in (("never", -1.0), ("0.9", 0.9), ("0.95", 0.95), ("0.99", 0.99)):
        found.append(
            (f"Elastic-Cache, {name}", confidence | {"policy": ElasticCache(WIDTH, gamma)})
        )
    paper = ElasticCache(WIDTH, 0.9, over="keys")
    found.append(("Elastic-Cache, 0.9, over keys", confidence | {"policy": paper}))
    always = ElasticCache(WIDTH, gamma=2.0)
    found.append(("Elastic-Cache, always", confidence | {"policy": always}))
    block_length = ours["dual"]["block_length"]
    found.append(("dLLM-Cache, in blocks", {"policy": DLLMCache(), "block_length": block_length}))
    return found


def refreshes_of(states, policy):
    """How often an Elastic-Cache recomputed what it had not asked for, in every decode.  -> (B,)

    A drift in the last layer comes too late to refresh anything.
    """
    chosen = torch.stack([state.chosen for state in states])  # (S, B, T)
    if not isinstance(policy, ElasticCache):
        return torch.zeros(chosen.shape[1])
    unasked = (torch.stack(policy.recomputed) > 0) & ~chosen
    return unasked.any(dim=2).sum(dim=0)


def measure(task, prompts, arguments):
    """How many problems were solved, share recomputed and refreshes of a decode, in the mean."""
    solved = 0
    shares = []
    refreshes = []
    for start in range(0, len(prompts), BATCH):
        prompt, mask = left_padded(prompts[start : start + BATCH])
        states = list(decode(task.model, prompt, task.gen_length, prompt_mask=mask, **arguments))
        responses = states[-1].tokens[:, prompt.shape[1] :]
        for response, problem in zip(responses, task.problems[start:]):
            text = decode_response(task.tokenizer, response, task.model.config.end_ids)
            solved += task.is_right(problem, text)[0]
        shares += work_done(states, arguments["policy"])[1].tolist()
        refreshes += refreshes_of(states, arguments["policy"]).tolist()
    return solved, statistics.fmean(shares), statistics.fmean(refreshes)


def main():
    """Print a row for each guest and for what it is compared with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default=EMBEDDED_MODEL, type=Path, help="with problems.jsonl")
    parser.add_argument("--problems", default=200, type=int, help="how many (200)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are small
    model = Transformer.from_pretrained(args.model)
    world = read_world(args.model, args.problems)
    task = Task(args.model.name, model, load_tokenizer(args.model), **world)
    prompts = encode_problems(task)
    table = []
    for name, arguments in rows(task.gen_length):
        solved, share, refreshes = measure(task, prompts, arguments)
        row = {
            "policy": name,
            "exact match": solved / len(prompts),
            "95 % interval": wilson_interval(solved, len(prompts)),
            "reused": 1 - share,
            "refreshes a decode": refreshes,
        }
        table.append(row)
    print(f"{len(prompts)} problems, {task.gen_length} steps a decode\n{table_text(table)}")


if __name__ == "__main__":
    main()

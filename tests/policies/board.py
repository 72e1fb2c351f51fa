"""The leaderboard: every policy of this repository on the problems of all worlds.

    python tests/policies/board.py --problems 32 --fresh 7

Rows are ranked by same text x reused: how often a policy writes, word for word, what exact decoding
writes in the same order, times the share of positions that it takes from the cache; the mean of the
worlds counts.
"""

import argparse
import statistics
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "guests")]

from bench import Row, measure_quality, table_text, world_task  # noqa: E402
from d2cache import WORLDS, SlidingWindow, load_policy, paper_settings  # noqa: E402
from dllm_cache import DLLMCache  # noqa: E402
from elastic_cache import ElasticCache  # noqa: E402
from entropy_cache import EntropyCache  # noqa: E402
from oldest_first import OldestFirst  # noqa: E402
from vicinity import Vicinity  # noqa: E402
from window_diffusion import WindowDiffusion  # noqa: E402

import torch  # noqa: E402  (after model, which keeps its import quiet)

BATCH = 32


def plan(gen_length, own):
    """Rows of bench.py's quality table, exact decoding first in each order."""
    ours = {name: arguments["policy"] for name, arguments in paper_settings(gen_length).items()}
    k = ours["d2cache"].k  # an eighth of the response
    by_prior = {
        "vanilla": ours["vanilla"],
        "d2Cache": ours["d2cache"],
        "oldest first": OldestFirst(k),
        "window of 4": SlidingWindow(4),
        "window of 5": SlidingWindow(5),
        "window of n / 8": SlidingWindow(k),
        "Elastic-Cache": ElasticCache(k),
        "Elastic-Cache, gamma .99": ElasticCache(k, gamma=0.99),
        "Window-Diffusion": WindowDiffusion(),
        **own,
    }
    in_blocks = {
        "vanilla": ours["vanilla"],
        "d2Cache": ours["d2cache"],
        "prefix cache": ours["prefix"],
        "dual cache": ours["dual"],
        "delayed cache": ours["delayed"],
        "dLLM-Cache": DLLMCache(),
        "Vicinity": Vicinity(),
        "EntropyCache": EntropyCache(),
        **own,
    }
    block_length = paper_settings(gen_length)["dual"]["block_length"]
    rows = [Row(name, "prior", {"policy": policy}, False) for name, policy in by_prior.items()]
    for name, policy in in_blocks.items():
        arguments = {"policy": policy, "block_length": block_length}
        rows.append(Row(name, "blocks", arguments, False))
    return rows


def side_by_side(tables):
    """Quality tables of the worlds, {name: rows}, as one, best first; without exact decoding."""
    merged = []
    for rows in zip(*tables.values()):
        ranks = [cells["same x reused"] for cells in rows]
        if None in ranks:
            continue
        row = {"policy": rows[0]["policy"], "order": rows[0]["order"]}
        for name, cells in zip(tables, rows):
            row[f"{name} solved"] = cells["exact match"]
            row[f"{name} same"] = cells["same text"]
            row[f"{name} reused"] = cells["reused"]
        row["same x reused"] = statistics.mean(ranks)
        merged.append(row)
    return sorted(merged, key=lambda row: -row["same x reused"])


def main():
    """Print the board, best first."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--problems", default=32, type=int, help="how many of each world (32)")
    parser.add_argument("--fresh", type=int, help="drawn anew with this seed")
    parser.add_argument("--policy", help="one more: FILE.py:Name or FILE.py:Name(k=8)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are small
    own = {args.policy: load_policy(args.policy)} if args.policy else {}
    tables = {}
    for name in WORLDS:
        task = world_task(name, args.problems, args.fresh)
        tables[name] = measure_quality(task, plan(task.gen_length, own), BATCH)
    print(table_text(side_by_side(tables)))


if __name__ == "__main__":
    main()

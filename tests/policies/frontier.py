"""Quality over work: what each policy reaches, over its setting, in every world.

    python tests/policies/frontier.py
    python tests/policies/frontier.py --policy FILE.py:Name --out mine.svg

The first decodes, for about ten minutes, and writes frontier.json and
frontier.svg beside this file. The second draws the same numbers, and a policy of your own as one
more mark.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from bench import Row, measure_quality, world_task  # noqa: E402
from controls import WithoutStage2  # noqa: E402
from d2cache import (  # noqa: E402
    WORLDS,
    D2Cache,
    DelayedCache,
    DualCache,
    PrefixCache,
    RecomputeAll,
    SlidingWindow,
    load_policy,
)
from tiny.picture import IN_PALE, INK, LEFT, PALE, TO_THE_LEFT, card, write  # noqa: E402

import torch  # noqa: E402  (after model, which keeps its import quiet)

NUMBERS = HERE / "frontier.json"
PICTURE = HERE / "frontier.svg"
PROBLEMS = 64  # of each world
BATCH = 32
BLOCK = 16  # the orders: by prior, or in blocks of so many

COLOURS = {
    "d²Cache": "#d1495b",
    "d²Cache without stage 2": "#f2b134",
    "sliding window": "#3d7ea6",
    "delayed cache": "#6b9a4b",
    "prefix cache": "#a99fcb",
    "dual cache": "#222222",
}
PANEL = 200  # its width and height
GAP = 50
TOP = 60
MOST = 0.72  # share recomputed at the right edge of a panel
DASHES = 'stroke-dasharray="5 3"'  # of the lines in blocks


def settings():
    """All that is measured: (policy's name, its setting in words, policy, block length or None)."""
    found = []
    for block_length in (None, BLOCK):
        for k in (2, 4, 6, 8, 12, 16):
            found.append(("d²Cache", f"k {k}", D2Cache(k), block_length))
            found.append(("d²Cache without stage 2", f"k {k}", WithoutStage2(k), block_length))
            found.append(("sliding window", f"width {k}", SlidingWindow(k), block_length))
    for interval in (2, 4, 8, 16):
        found.append(("delayed cache", f"interval {interval}", DelayedCache(interval), BLOCK))
    for block_length in (4, 8, 16):
        setting = f"blocks of {block_length}"
        found.append(("prefix cache", setting, PrefixCache(), block_length))
        found.append(("dual cache", setting, DualCache(), block_length))
    return found


def measure(settings, worlds=WORLDS):
    """Where they lie in every world, beside exact decoding in their orders: dicts to be written."""
    numbers = []
    for name in worlds:
        task = world_task(name, PROBLEMS)
        lengths = dict.fromkeys(block_length for *_, block_length in settings)
        exact = [("vanilla", "", RecomputeAll(), block_length) for block_length in lengths]
        points = exact + settings
        rows = [Row(policy, n, dict(policy=p, block_length=n), False) for policy, _, p, n in points]
        quality = measure_quality(task, rows, BATCH)
        for (policy, setting, _, block_length), cells in zip(points, quality):
            point = {"world": name, "policy": policy, "setting": setting, "block": block_length}
            point["recomputed"] = round(1 - cells["reused"], 4)
            point["solved"] = cells["exact match"]
            point["same text"] = 1.0 if policy == "vanilla" else cells["same text"]
            numbers.append(point)
    return numbers


def draw(numbers, own=()):
    """A panel for each world and measure; own: the points of a policy to be marked."""
    body = ""
    for row, measured in enumerate(("solved", "same text")):
        top = TOP + row * (PANEL + GAP)
        for column, world in enumerate(WORLDS):
            left = LEFT + column * (PANEL + GAP)
            points = [point for point in numbers if point["world"] == world]
            marks = [point for point in own if point["world"] == world]
            body += panel(left, top, f"{world}: {measured}", measured, points, marks)
    bottom = TOP + 2 * (PANEL + GAP)
    return card(bottom + 80, body + legend(bottom + 10, own), "Quality over work")


def panel(left, top, title, measured, points, marks):
    """Axes, a line for each policy and order, and the marks."""

    def place(point):
        x = left + PANEL * point["recomputed"] / MOST
        return x, top + PANEL * (1 - point[measured])

    body = write(left, top - 10, title, 13, 'font-weight="bold"')
    body += f'<path stroke="{PALE}" fill="none" d="M{left} {top}v{PANEL}h{PANEL}"/>\n'
    for tick in (0, 50, 100):
        y = top + PANEL * (1 - tick / 100)
        body += write(left - 6, y + 4, f"{tick} %", 10, f"{IN_PALE} {TO_THE_LEFT}")
    for tick in (0, 20, 40, 60):
        x = left + PANEL * tick / 100 / MOST
        body += write(x, top + PANEL + 14, f"{tick} %", 10, f'{IN_PALE} text-anchor="middle"')
    for name, colour in COLOURS.items():
        mine = [point for point in points if point["policy"] == name]
        by_prior = [place(point) for point in mine if point["block"] is None]
        in_blocks = [place(point) for point in mine if point["block"] is not None]
        body += line(by_prior, colour, "") + line(in_blocks, colour, DASHES)
    for point in marks:
        x, y = place(point)
        body += diamond_at(x, y, "white" if point["block"] else INK)
    return body


def line(places, colour, dashes):
    """A curve through places, (x, y) each, in the order of the setting."""
    if not places:
        return ""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    body = f'<path stroke="{colour}" stroke-width="1.5" fill="none" {dashes} d="M{path}"/>\n'
    for x, y in places:
        body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>\n'
    return body


def diamond_at(x, y, fill):
    diamond = f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7-7z"
    return f'<path class="own" fill="{fill}" stroke="{INK}" d="{diamond}"/>\n'


def legend(top, own):
    """The axis, the colours and the dashes in words."""
    said = "Across: share of positions recomputed. Solid: decoded by prior; dashed: in blocks of"
    body = write(LEFT, top, f"{said} {BLOCK}, those of prefix and dual cache of 4, 8 and 16.", 12)
    for n, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 250 * (n % 3)
        y = top + 14 + 20 * (n // 3)
        body += f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>\n'
        body += write(x + 20, y + 10.5, name, 12)
    if own:
        body += diamond_at(LEFT + 6, top + 62, INK)
        body += write(LEFT + 20, top + 66, own[0]["policy"], 12)
    return body


def main():
    """Decode, and draw the frontier; or draw it with a policy of your own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--policy", help="FILE.py:Name, a policy of your own to be marked")
    parser.add_argument(
        "--out", type=Path, help="SVG file to write; a policy of your own needs one"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are small
    if args.policy is None:
        numbers = measure(settings())
        lines = ",\n".join(json.dumps(point, ensure_ascii=False) for point in numbers)
        NUMBERS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        PICTURE.write_text(draw(numbers), encoding="utf-8")
        return
    if args.out is None:
        parser.error("--out is missing, should say where this picture goes")
    policy = load_policy(args.policy)
    name = args.policy.partition(".py:")[2]
    own = measure([(name, "", policy, None), (name, "", policy, BLOCK)])
    own = [point for point in own if point["policy"] == name]
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    args.out.write_text(draw(numbers, own), encoding="utf-8")


if __name__ == "__main__":
    main()

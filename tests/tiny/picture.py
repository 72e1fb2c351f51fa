"""Two pictures of what a cache saves, drawn as SVG from what the embedded model does.

    python tests/tiny/picture.py map     which positions are recomputed at which step
    python tests/tiny/picture.py race    the answer appearing, at the speed of the work it takes

`map --policy FILE.py:Name --out FILE` draws the map of a policy of your own.
"""

import argparse
import sys
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from d2cache import EMBEDDED_MODEL, decode, load_policy, paper_settings, roles  # noqa: E402
from model import Transformer, encode_prompt, load_tokenizer, require  # noqa: E402
from tiny.problems import SAMPLE  # noqa: E402

GEN_LENGTH = 64
END_OF_TEXT = "<eos>"

TITLES = {  # of the policies in d2cache.paper_settings: name, and what it recomputes
    "vanilla": ("vanilla", "everything"),
    "prefix": ("prefix cache", "the block and all that follows it"),
    "dual": ("dual cache", "the block"),
    "window": ("sliding window", "the next few masked positions"),
    "d2cache": ("d²Cache", "masked positions by certainty prior, known ones by attention rollout"),
}
IN_MAP = ("vanilla", "dual", "window", "d2cache")
IN_RACE = ("vanilla", "prefix", "dual", "d2cache")

# What a step does at a position. Where two hold, the later one is seen.
COLOURS = {
    "first": "#a99fcb",
    "known": "#3d7ea6",
    "candidates": "#f2b134",
    "fresh": "#d1495b",
    "committed": "#222222",
}
CACHED = "#ececec"
LEGEND = {
    "cached": "from the cache",
    "first": "first step: everything",
    "known": "recomputed: known",
    "candidates": "recomputed: masked",
    "fresh": "recomputed: decoded just before",
    "committed": "decoded in this step",
}

WIDTH = 850
LEFT = 56
RIGHT = 24
INK = "#222222"
PALE = "#6b6b6b"
CARD = "#ffffff"

# Attributes of texts.
IN_PALE = f'fill="{PALE}"'
TO_THE_LEFT = 'text-anchor="end"'

ROW = 2  # height of a step in the map
WORD_SIZE = 10.5
WORDS_HEIGHT = 56  # of each of the two rows of words

SECONDS = 20  # that the slowest decode of the race takes
CHARACTER = 8  # its width in the race
LINE = 24
BAR = 14  # its height
TRACK = WIDTH - LEFT - RIGHT - 42  # the longest bar, with room for its share
TITLE = "The same answer for less work"
LINE_LENGTH = (WIDTH - LEFT - RIGHT) // CHARACTER
LONGEST_WORD = 12


@dataclass(frozen=True)
class Run:
    """A decode of the question, as the pictures need it."""

    name: str
    recomputes: str  # in words
    order: str  # of decoding, in words
    words: list  # text of each position at the end
    prompt_length: int
    steps: list  # for each step: {role: positions}
    work: list  # for each step: the number of positions recomputed

    @property
    def share(self):
        """Of the positions, those recomputed, mean over steps."""
        return sum(self.work) / (len(self.steps) * len(self.words))


def order_of(arguments):
    """The order of decoding in words."""
    if "block_length" in arguments:
        return f"decoded in blocks of {arguments['block_length']}"
    return "decoded by certainty prior"


def watch(states, tokenizer, prompt_length, name, recomputes, order):
    """What every step of a decode did, from its states."""
    before = None
    steps = []
    work = []
    for state in states:
        steps.append(positions_by_role(before, state))
        work.append(state.chosen.sum().item())
        before = state

    ids = state.tokens[0].tolist()
    words = [tokenizer.decode([id], skip_special_tokens=False) for id in ids]
    return Run(name, recomputes, order, words, prompt_length, steps, work)


def positions_by_role(before, state):
    """{key of COLOURS: positions} of the step from `before`, None for the first, to `state`."""
    masks = roles(before, state)
    if before is None:  # everything is recomputed, for no policy's reasons
        masks = {"first": state.chosen, "committed": masks["committed"]}
    return {role: mask[0].nonzero()[:, 0].tolist() for role, mask in masks.items()}


def write(x, y, content, size=13, attributes=""):
    """An SVG text; x and y are where it begins, unless the attributes say otherwise."""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}"'
    return f"<text {place} {attributes}>{escape(content)}</text>\n"


def title(run, y):
    """The policy's name, and in pale what it recomputes."""
    name = f'<tspan font-weight="bold">{escape(run.name)}</tspan>'
    recomputes = f'<tspan fill="{PALE}" dx="8">{escape(run.recomputes)}</tspan>'
    return f'<text x="{LEFT}" y="{y:g}" font-size="13">{name}{recomputes}</text>\n'


def card(height, body, says, style=""):
    """A picture on a white card, so that it reads on dark pages too."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" font-family="system-ui, sans-serif" fill="{INK}">\n'
        f"<title>{says}</title>\n<style>{style}</style>\n"
        f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{CARD}"/>\n{body}</svg>\n'
    )


# ---- The map -------------------------------------------------------------------------------------


def draw_map(runs):
    """Small multiples of one scale: steps down, positions across, a panel for each run."""
    body = ""
    y = 8
    words = None
    for run in runs:
        if run.words != words:  # a run that decodes other words has an axis of its own
            y += 2 * WORDS_HEIGHT
            body += words_axis(run, y)
            words = run.words
        body += panel(run, y + 30)
        y += 30 + ROW * len(run.steps) + 26
    return card(y + 62, body + legend(y + 18), "Positions recomputed, step by step")


def column_width(run):
    return (WIDTH - LEFT - RIGHT) // len(run.words)


def words_axis(run, bottom):
    """The words, written upwards above their columns; where it is crowded, in an upper row."""
    axis = write(LEFT - 8, bottom, "position", 11, f"{IN_PALE} {TO_THE_LEFT}")
    last_in_lower_row = -WIDTH
    for label, start, length in labels(run.words):
        x = LEFT + (start + length / 2) * column_width(run)
        y = bottom
        if x - last_in_lower_row > WORD_SIZE:
            last_in_lower_row = x
        else:
            y -= WORDS_HEIGHT
            axis += f'<path stroke="{CACHED}" d="M{x:.1f} {y + 3}V{bottom}"/>\n'
        upwards = f"translate({x + WORD_SIZE / 3:.1f} {y}) rotate(-90)"
        axis += write(0, 0, label, WORD_SIZE, f'transform="{upwards}"')
    return axis


def labels(words):
    """What is written of tokens: (word with its signs, or end of text, first position, length)."""
    starts = [position for position in range(len(words)) if starts_label(words, position)]
    ends = starts[1:] + [len(words)]
    found = []
    for start, end in zip(starts, ends):
        length = end - start
        label = "".join(words[start:end]).strip()
        if words[start] == END_OF_TEXT:
            label = f"{END_OF_TEXT} × {length}"
        found.append((label, start, length))
    return found


def starts_label(words, position):
    """Whether the token begins a word, or a stretch of end-of-text."""
    after_end = position > 0 and words[position - 1] == END_OF_TEXT
    if words[position] == END_OF_TEXT:
        return not after_end
    return after_end or words[position].startswith(" ")


def panel(run, top):
    """The map of one run, its title above and its share below."""
    columns = len(run.words)
    rows = len(run.steps)
    width = column_width(run)
    bottom = top + ROW * rows
    cells = f'<path class="cached" fill="{CACHED}" d="M0 0h{columns}v{rows}h-{columns}z"/>\n'
    for role, colour in COLOURS.items():
        path = ""
        for row, step in enumerate(run.steps):
            for start, length in stretches(step.get(role, [])):
                path += f"M{start} {row}h{length}v1h-{length}z"
        if path:
            cells += f'<path class="{role}" fill="{colour}" d="{path}"/>\n'

    response = LEFT + run.prompt_length * width
    recomputed = f"{run.share:.1%} recomputed: {sum(run.work):,} of {rows * columns:,} positions"
    beside = f"{IN_PALE} {TO_THE_LEFT}"
    return (
        title(run, top - 8)
        + f'<g transform="translate({LEFT} {top}) scale({width} {ROW})" '
        + f'shape-rendering="crispEdges">\n{cells}</g>\n'
        + f'<path stroke="{INK}" d="M{response} {top - 4}V{bottom + 4}"/>\n'
        + write(LEFT - 8, top + 9, "step 1", 11, beside)
        + write(LEFT - 8, bottom, f"{rows}", 11, beside)
        + write(response - 8, bottom + 15, "prompt", 11, beside)
        + write(response + 8, bottom + 15, "response", 11, IN_PALE)
        + write(LEFT, bottom + 15, run.order, 11, IN_PALE)
        + write(LEFT + columns * width, bottom + 15, recomputed, 12, TO_THE_LEFT)
    )


def stretches(positions):
    """Ascending positions as stretches of neighbours, (start, length)."""
    found = []
    for position in positions:
        if found and sum(found[-1]) == position:
            start, length = found[-1]
            found[-1] = (start, length + 1)
        else:
            found.append((position, 1))
    return found


def legend(top):
    """What each colour says, in two rows."""
    body = ""
    for n, (role, meaning) in enumerate(LEGEND.items()):
        x = LEFT + 250 * (n % 3)
        y = top + 22 * (n // 3)
        colour = COLOURS.get(role, CACHED)
        body += f'<rect x="{x}" y="{y:g}" width="12" height="12" fill="{colour}"/>\n'
        body += write(x + 20, y + 10.5, meaning, 12)
    return body


# ---- The race ------------------------------------------------------------------------------------

# Without animation everything looks as in the last frame, which therefore stands.
STYLE = f"""
.mask {{ fill: #cccccc; opacity: 0; animation: show }}
.word {{ animation: hide; animation-fill-mode: backwards }}
.count {{ opacity: 0; animation: show }}
.bar {{ fill: {COLOURS["known"]}; transform-box: fill-box; animation: grow linear }}
@keyframes show {{ from, to {{ opacity: 1 }} }}
@keyframes hide {{ from, to {{ opacity: 0 }} }}
@keyframes grow {{ from {{ transform: scaleX(0) }} }}
@media (prefers-reduced-motion: reduce) {{ * {{ animation: none !important }} }}
"""


def draw_race(runs):
    """A lane for each run; all recompute equally many positions in a second."""
    slowest = max(sum(run.work) for run in runs)
    speed = slowest / SECONDS
    said = f"Each lane recomputes {speed:.0f} positions in a second: this is work, not time."
    body = write(LEFT, 36, TITLE, 16, 'font-weight="bold"')
    body += write(LEFT, 56, said, attributes=IN_PALE)
    top = 92
    for run in runs:
        lane, height = race_lane(run, top, speed, TRACK / slowest)
        body += lane
        top += height
    return card(top - 10, body, TITLE, STYLE)


def race_lane(run, top, speed, scale):
    """A run's title, counter, bar and answer; the bar is `scale` long for a position.

    -> SVG, height
    """
    done = [total / speed for total in accumulate(run.work)]  # when each step is, in seconds
    counter = race_counter(run, top, done)
    bar = race_bar(run, top + 8, done[-1], scale)
    answer, lines = race_answer(run, top + 46, done)
    return title(run, top) + counter + bar + answer, LINE * lines + 66


def race_counter(run, y, done):
    """The number of positions recomputed: a text for each step, seen until the next is done."""
    starts = [0, *done]
    counts = [0, *accumulate(run.work)]
    body = ""
    for count, start, end in zip(counts, starts, done):
        style = f"animation-delay: {start:.3f}s; animation-duration: {end - start:.3f}s"
        body += f'<text class="count" style="{style}">{count:,}</text>\n'
    body += f'<text class="word" style="animation-delay: {done[-1]:.3f}s">{counts[-1]:,}</text>\n'

    said = write(WIDTH - RIGHT, y, "positions recomputed", 13, f"{IN_PALE} {TO_THE_LEFT}")
    place = f"translate({WIDTH - RIGHT - 146} {y})"
    return f'{said}<g transform="{place}" text-anchor="end" font-size="13">\n{body}</g>\n'


def race_bar(run, y, seconds, scale):
    """The same as a length, and at its end the share."""
    length = scale * sum(run.work)
    size = f'x="{LEFT}" y="{y}" height="{BAR}"'
    grows = f'class="bar" style="animation-duration: {seconds:.3f}s"'
    appears = f'class="word" style="animation-delay: {seconds:.3f}s" font-size="11"'
    return (
        f'<rect {size} width="{TRACK}" fill="{CACHED}"/>\n'
        f'<rect {size} width="{length:.1f}" {grows}/>\n'
        f'<text x="{LEFT + length + 6:.1f}" y="{y + 11}" {appears}>{run.share:.0%}</text>\n'
    )


def race_answer(run, top, done):
    """Every word of the response, a dash until it is decoded.  -> SVG, number of lines"""
    decoded_at = {}
    for step, seconds in zip(run.steps, done):
        decoded_at |= dict.fromkeys(step["committed"], seconds)

    response = [word.replace(END_OF_TEXT, " ·") for word in run.words[run.prompt_length :]]
    body = ""
    for i, (word, column, line) in enumerate(broken_into_lines(response)):
        seconds = decoded_at[run.prompt_length + i]
        x = LEFT + CHARACTER * column
        y = top + LINE * line
        dash = f'x="{x}" y="{y - 6}" width="{CHARACTER * len(word) - 2}" height="4" rx="2"'
        shown = f'class="word" style="animation-delay: {seconds:.3f}s"'
        hidden = f'class="mask" style="animation-duration: {seconds:.3f}s"'
        body += f'<rect {hidden} {dash}/><text {shown} x="{x}" y="{y}">{escape(word)}</text>\n'

    font = 'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13"'
    return f"<g {font}>\n{body}</g>\n", line + 1


def broken_into_lines(words):
    """(word without its space, column, line) of each word; a line breaks at a space."""
    placed = []
    column = 0
    line = 0
    for word in words:
        if word.startswith(" ") and column > LINE_LENGTH - LONGEST_WORD:
            column = 0
            line += 1
        bare = word.strip()
        if column > 0:
            column += len(word) - len(bare)
        placed.append((bare, column, line))
        column += len(bare)
    return placed


# ---- The command line ----------------------------------------------------------------------------


def main():
    """Draw what the policies recompute, from the embedded model, as SVG."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("picture", choices=("map", "race"))
    parser.add_argument("--policy", help="FILE.py:Name, a policy of your own to draw the map of")
    parser.add_argument("--out", help="SVG file to write; a policy of your own needs one")
    args = parser.parse_args()
    try:
        own = None if args.policy is None else load_policy(args.policy)
        require(own is None or args.picture == "map", "--policy is for the map alone")
        require(own is None or args.out, "--out is missing, should say where this map goes")
        path = Path(args.out or HERE / f"{args.picture}.svg")
        refuse_unwritable(path)
        path.write_text(draw(args.picture, own), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def refuse_unwritable(path):
    """OSError, before the work, if no file can be written there."""
    existed = path.exists()
    path.open("a").close()
    if not existed:
        path.unlink()


def draw(picture, own=None):
    """The SVG of "map" or "race"; with a policy of one's own, its map alone."""
    model = Transformer.from_pretrained(EMBEDDED_MODEL)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    prompt = encode_prompt(tokenizer, SAMPLE)

    ours = paper_settings(GEN_LENGTH)

    def run(arguments, name, recomputes):
        states = decode(model, prompt, GEN_LENGTH, **arguments)
        return watch(states, tokenizer, prompt.shape[1], name, recomputes, order_of(arguments))

    if own is not None:
        return draw_map([run({"policy": own}, type(own).__name__, "")])
    if picture == "map":
        return draw_map([run(ours[name], *TITLES[name]) for name in IN_MAP])
    return draw_race([run(ours[name], *TITLES[name]) for name in IN_RACE])


if __name__ == "__main__":
    main()

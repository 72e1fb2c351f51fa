"""The pictures against decodes: not how they look, but that they show what was done."""

import re
import sys
from itertools import accumulate, pairwise
from xml.etree import ElementTree

import pytest
from d2cache import EMBEDDED_MODEL, decode, paper_settings
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer, encode_prompt, load_tokenizer

from tiny import picture
from tiny.problems import SAMPLE

SVG = "{http://www.w3.org/2000/svg}"
RECOMPUTED = {"first", "known", "candidates", "fresh"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def states(tokenizer):
    """Every state of the decodes that the pictures show, by policy."""
    model = Transformer.from_pretrained(EMBEDDED_MODEL)
    prompt = encode_prompt(tokenizer, SAMPLE)
    return {
        name: list(decode(model, prompt, 64, **paper_settings(64)[name]))
        for name in {*picture.IN_MAP, *picture.IN_RACE}
    }


@pytest.fixture(scope="module")
def runs(states, tokenizer):
    P = states["vanilla"][0].known[0].sum().item() - 1  # all but the one decoded first
    found = {}
    for name in states:
        order = picture.order_of(paper_settings(64)[name])
        found[name] = picture.watch(states[name], tokenizer, P, *picture.TITLES[name], order)
    return found


@pytest.fixture(scope="module")
def drawn_map(runs):
    return ElementTree.fromstring(picture.draw_map([runs[name] for name in picture.IN_MAP]))


@pytest.fixture(scope="module")
def drawn_race(runs):
    return ElementTree.fromstring(picture.draw_race([runs[name] for name in picture.IN_RACE]))


def texts(root):
    return [text.text or "" for text in root.iter(SVG + "text")]


def words(root):
    return [text for text in texts(root) if not re.search(r"\d", text)]


def cells(path):
    """(row, position) of every cell of a path."""
    drawn = []
    for start, row, length in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d")):
        drawn += [(int(row), int(start) + i) for i in range(int(length))]
    return drawn


def panels(drawn_map):
    """{class: cells} of every panel."""
    groups = [group for group in drawn_map.iter(SVG + "g") if "scale" in group.get("transform")]
    return [{path.get("class"): cells(path) for path in group} for group in groups]


def lanes(drawn_race, name):
    """The elements of a class, one list for each lane: lanes lie below one another."""
    found = []
    for element in drawn_race.iter():
        if element.get("class") == "bar":
            found.append([])
        if element.get("class") == name and found:
            found[-1].append(element)
    return found


def seconds(element, what):
    return float(re.search(rf"animation-{what}: ([\d.]+)s", element.get("style")).group(1))


def work(states):
    """Positions recomputed by each step."""
    return [state.chosen.sum().item() for state in states]


def test_every_cell_of_the_map_is_a_position_recomputed(drawn_map, states):
    for name, panel in zip(picture.IN_MAP, panels(drawn_map), strict=True):
        drawn = [cell for role in RECOMPUTED & panel.keys() for cell in panel[role]]
        chosen = {
            (row, position)
            for row, state in enumerate(states[name])
            for position in state.chosen[0].nonzero()[:, 0].tolist()
        }
        assert len(drawn) == len(set(drawn)) and set(drawn) == chosen


def test_a_cell_has_the_colour_of_what_its_position_was_before_the_step(drawn_map, states):
    """The first step has a colour of its own: no policy chose it."""
    for name, panel in zip(picture.IN_MAP, panels(drawn_map), strict=True):
        assert {row for row, _ in panel["first"]} == {0}
        for role in RECOMPUTED & panel.keys() - {"first"}:
            for row, position in panel[role]:
                before = states[name][row - 1]
                known = before.known[0, position].item()
                fresh = before.fresh[0, position].item()
                assert known == (role != "candidates") and fresh == (role == "fresh")
        committed = {
            (row, state.fresh[0].int().argmax().item()) for row, state in enumerate(states[name])
        }
        assert set(panel["committed"]) == committed


def test_the_map_says_the_share_that_was_recomputed(drawn_map, states):
    said = [text for text in texts(drawn_map) if text.endswith("positions")]
    for name, text in zip(picture.IN_MAP, said, strict=True):
        T = states[name][0].tokens.shape[1]
        total = sum(work(states[name]))
        assert text == f"{total / (64 * T):.1%} recomputed: {total:,} of {64 * T:,} positions"


def test_words_stand_above_their_positions(runs):
    words = runs["d2cache"].words
    labels = picture.labels(words)
    assert [start for _, start, _ in labels] == [0, *accumulate(n for _, _, n in labels)][:-1]
    *written, (end, start, length) = labels
    assert " ".join(label for label, _, _ in written) == "".join(words[:start]).strip()
    assert end == f"<eos> × {length}" and words[start:] == length * ["<eos>"]


@given(st.sets(st.integers(0, 30)))
def test_stretches_hold_the_positions_and_are_not_next_to_each_other(positions):
    stretches = picture.stretches(sorted(positions))
    held = [start + i for start, length in stretches for i in range(length)]
    assert held == sorted(positions)
    gaps = [after - start - length for (start, length), (after, _) in pairwise(stretches)]
    assert all(gap > 0 for gap in gaps)


def test_every_lane_of_the_race_takes_time_in_proportion_to_its_work(drawn_race, states):
    totals = [sum(work(states[name])) for name in picture.IN_RACE]
    bars = [bar for (bar,) in lanes(drawn_race, "bar")]
    for bar, total in zip(bars, totals, strict=True):
        share = total / max(totals)
        assert seconds(bar, "duration") == pytest.approx(picture.SECONDS * share, abs=1e-3)
        assert float(bar.get("width")) == pytest.approx(picture.TRACK * share, abs=0.1)


def test_a_word_appears_when_the_work_until_its_step_is_done(drawn_race, states):
    speed = max(sum(work(steps)) for steps in states.values()) / picture.SECONDS
    appearing = lanes(drawn_race, "word")
    hidden = lanes(drawn_race, "mask")
    for lane, name in enumerate(picture.IN_RACE):
        done = {}
        for state, total in zip(states[name], accumulate(work(states[name]))):
            done[state.fresh[0].int().argmax().item()] = total / speed
        expected = [done[position] for position in sorted(done)]
        delays = [seconds(word, "delay") for word in appearing[lane][1:65]]  # after the share
        durations = [seconds(mask, "duration") for mask in hidden[lane]]
        assert delays == durations == pytest.approx(expected, abs=1e-3)


def test_counters_run_over_the_work_without_a_gap(drawn_race, states):
    counts = [text for text in drawn_race.iter(SVG + "text") if text.get("class") == "count"]
    for name in picture.IN_RACE:
        lane, counts = counts[:64], counts[64:]
        shown = [int(text.text.replace(",", "")) for text in lane]
        assert shown == [0, *accumulate(work(states[name]))][:-1]
        for text, after in pairwise(lane):
            end = seconds(text, "delay") + seconds(text, "duration")
            assert end == pytest.approx(seconds(after, "delay"), abs=2e-3)
    assert not counts


def test_without_animation_the_race_shows_the_last_frame():
    rules = dict(re.findall(r"\.(\w+) \{([^}]*)\}", picture.STYLE))
    assert {name for name in rules if "opacity: 0" in rules[name]} == {"mask", "count"}
    assert "infinite" not in picture.STYLE and "forwards" not in picture.STYLE


@pytest.mark.parametrize("name", ["map", "race"])
def test_the_pictures_at_hand_show_the_model_at_hand(name, request):
    """Compares words, not numbers: round-off may choose other positions on another machine."""
    at_hand = ElementTree.parse(EMBEDDED_MODEL / f"{name}.svg").getroot()
    drawn = request.getfixturevalue(f"drawn_{name}")
    assert words(at_hand) == words(drawn)
    assert not list(at_hand.iter(SVG + "script"))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["picture.py", *map(str, arguments)])
    picture.main()


def test_a_policy_of_ones_own_has_its_map(tmp_path, monkeypatch):
    policy = tmp_path / "mine.py"
    policy.write_text(
        "class Mine:\n"
        "    uses_attention = False\n"
        "    def choose(self, state):\n"
        "        return state.masked\n"
    )
    out = tmp_path / "mine.svg"
    run(monkeypatch, "map", "--policy", f"{policy}:Mine", "--out", out)
    (panel,) = panels(ElementTree.parse(out).getroot())
    assert len(panel["candidates"]) == sum(range(64))  # 63 masks after the first step, then 62 ...
    assert panel.keys() == {"cached", "first", "candidates", "committed"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["map", "--out", "nowhere/map.svg"], "nowhere/map.svg"),
        (["race", "--out", "."], "Is a directory"),
        (["map", "--policy", "nowhere.py:Mine", "--out", "map.svg"], "nowhere.py"),
        (["map", "--policy", "d2cache.py:DualCache"], "--out"),
        (["race", "--policy", "d2cache.py:DualCache", "--out", "race.svg"], "--policy"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_work(
    arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picture, "draw", lambda *_: pytest.fail("it worked"))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

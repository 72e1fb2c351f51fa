"""The frontier: that its numbers are those of decodes, and its marks stand where they say."""

import json
import sys
from xml.etree import ElementTree

import pytest
from d2cache import WORLDS

import frontier

NUMBERS = json.loads(frontier.NUMBERS.read_text(encoding="utf-8"))


def name_of(point):
    return point["policy"], point["setting"], point["block"]


def test_every_setting_was_measured_in_every_world_beside_exact_decoding():
    settings = [(policy, setting, block) for policy, setting, _, block in frontier.settings()]
    lengths = {block for *_, block in settings}
    for world in WORLDS:
        names = [name_of(point) for point in NUMBERS if point["world"] == world]
        assert sorted(map(str, names)) == sorted(
            map(str, settings + [("vanilla", "", length) for length in lengths])
        )


def test_a_point_measured_again_is_where_it_was():
    """Nearly: round-off may choose other positions on another machine."""
    world = "journey"
    name = ("d²Cache", "k 4", None)
    (setting,) = [s for s in frontier.settings() if (s[0], s[1], s[3]) == name]
    _, again = frontier.measure([setting], [world])
    (stored,) = [
        point for point in NUMBERS if point["world"] == world and name_of(point) == name_of(again)
    ]
    for number in ("recomputed", "solved", "same text"):
        assert again[number] == pytest.approx(stored[number], abs=0.05)


def test_a_circle_stands_where_its_point_says():
    """Half of the panel across, and a quarter solved a quarter up."""
    point = {"world": "tiny", "policy": "dual cache", "setting": "", "block": 16}
    point |= {"recomputed": frontier.MOST / 2, "solved": 0.25, "same text": 1.0}
    drawn = frontier.draw([point])
    x = frontier.LEFT + frontier.PANEL / 2
    low = frontier.TOP + 0.75 * frontier.PANEL
    high = frontier.TOP + frontier.PANEL + frontier.GAP
    for y in (low, high):
        assert f'<circle cx="{x:.1f}" cy="{y:.1f}"' in drawn
    assert drawn.count("<circle") == 2


def test_the_picture_at_hand_shows_the_numbers_at_hand():
    assert frontier.PICTURE.read_text(encoding="utf-8") == frontier.draw(NUMBERS)


def test_a_policy_of_ones_own_is_marked_in_every_panel_and_both_orders(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "PROBLEMS", 2)
    out = tmp_path / "mine.svg"
    policy = f"{frontier.HERE / 'oldest_first.py'}:OldestFirst(k=6)"
    monkeypatch.setattr(sys, "argv", ["frontier.py", "--policy", policy, "--out", str(out)])
    frontier.main()
    drawn = ElementTree.parse(out).getroot()
    marks = [element for element in drawn.iter() if element.get("class") == "own"]
    assert len(marks) == 2 * len(WORLDS) * 2 + 1  # solved and same text; and in the legend

"""The course: its starter beside the reference, and the laws by which it is graded."""

import inspect
from unittest.mock import patch

import d2cache
import starter
from d2cache import EMBEDDED_MODEL, EXAMPLE, places
from model import Transformer, encode_prompt, load_tokenizer

import grading


def test_the_embedded_model_decodes_the_same_words(file=d2cache.__file__):
    """From the same positions in every step, with all that a file defines in the place of ours.

    The grader names a student's file, pytest none: then ours is loaded as if it were one.
    """
    model = Transformer.from_pretrained(EMBEDDED_MODEL)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    prompt = encode_prompt(tokenizer, EXAMPLE)

    def lines():
        for state in d2cache.decode(model, prompt, 64, policy=d2cache.D2Cache(k=8)):
            words = tokenizer.decode(state.tokens[0, prompt.shape[1] :].tolist())
            yield f"{words}, step {state.step} recomputes {places(state.chosen[0])}"

    right = list(lines())
    theirs = grading.replacements(grading.load(file), grading.POINTS)
    with patch.multiple(d2cache, **theirs):
        for computed, expected in zip(lines(), right, strict=True):
            if computed != expected:
                raise AssertionError(f"computed {computed}\nexpected {expected}")


def functions(module):
    """{name: function} of all that is graded; stages are methods of D2Cache."""
    found = {}
    for name in grading.POINTS:
        found[name] = getattr(module.D2Cache if name in grading.STAGES else module, name)
    return found


def test_the_starter_has_the_signatures_of_the_reference():
    ours = functions(d2cache)
    for name, function in functions(starter).items():
        assert inspect.signature(function) == inspect.signature(ours[name]), name
    assert inspect.signature(starter.D2Cache) == inspect.signature(d2cache.D2Cache)

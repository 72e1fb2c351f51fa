"""Checkpoints damaged at random: each ends in a decode, or in one ValueError of a few lines, within
seconds and without gigabytes."""

import json
import resource
import time
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO

import pytest
import torch
from checkpoints import DREAM, TINY, VOCAB, hf_name, make_tensors, write_checkpoint
from checkpoints import write_llada_tokenizer, write_qwen2
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer, decode_response, encode_prompt, load_tokenizer, read_config
from safetensors.torch import load_file

from d2cache import D2Cache, generate
from training import save_tensors

ROWS = len(VOCAB) + 10
PROMPT = "the hello, 42 <|eot_id|>"


def whole(folder, layout):
    """A checkpoint in which nothing is wrong."""
    sizes = {"vocab_size": ROWS, "mask_token_id": len(VOCAB) + 2, "eos_token_id": 0}
    if layout == "LLaDA":
        config = TINY | sizes | {"embedding_size": ROWS}
        tensors = make_tensors(config)
        write_llada_tokenizer(write_checkpoint(folder, config, tensors, n_shards=2))
    else:
        config = DREAM | sizes
        (folder / "config.json").write_text(json.dumps(config))
        ours = asdict(read_config(folder / "config.json"))
        tensors = {hf_name(name): tensor for name, tensor in make_tensors(ours).items()}
        write_qwen2(write_checkpoint(folder, config, tensors))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    about = {"mask_token": "<|mask|>", "chat_template": "<|im_start|>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def outcome(folder, model_first=True):
    """The answer of a checkpoint, whichever part of it is read first."""
    if model_first:
        Transformer.from_pretrained(folder)
    with redirect_stderr(StringIO()):  # notes on the chat template
        tokenizer = load_tokenizer(folder)
    prompt = encode_prompt(tokenizer, PROMPT)
    model = Transformer.from_pretrained(folder)
    tokens = generate(model, prompt, 4, policy=D2Cache(k=2), sigma=2.0)
    return decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.end_ids)


# What becomes of a value in a JSON file

NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 7, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30])
FLOATS = st.sampled_from([0.0, 0.5, -1.0, 1e-40, 1e300, float("nan"), float("inf")])
SIMPLE = st.none() | st.booleans() | NUMBERS | FLOATS | st.text(max_size=9)
VALUES = SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(st.text(max_size=9), SIMPLE)
DROP = object()


def places(values, path=()):
    """Every place in a JSON value, as a path of keys."""
    inside = []
    if isinstance(values, dict):
        inside = list(values.items())
    elif isinstance(values, list):
        inside = list(enumerate(values))
    return [path] + [place for key, value in inside for place in places(value, (*path, key))]


def damage_json(data, folder):
    """Another value at some place of a file, one new key included; twice in config.json."""
    file = data.draw(st.sampled_from(sorted(folder.glob("*.json"))), label="JSON file")
    for _ in range(2 if file.name == "config.json" else 1):
        values = json.loads(file.read_text(encoding="utf-8"))
        # A vocabulary has hundreds of places: the first and the last ones of each length do.
        found = [place for place in places(values) if len(place) < 3] + places(values)[-9:]
        found += [("quantization_config",), ("rope_parameters",)]
        *path, last = data.draw(st.sampled_from([place for place in found if place]), label="place")
        value = data.draw(VALUES | st.just(DROP), label="value")
        parent = values
        for key in path:
            parent = parent[key]
        if value is not DROP:
            parent[last] = value
        elif last in parent or isinstance(parent, list):
            del parent[last]
        file.write_text(json.dumps(values), encoding="utf-8")


# What becomes of a file's bytes

CONTENTS = [b"", b"\0" * 9, b"\xff" * 9, b"{" * 10**4, b"[" * 10**5, b"null", b"{}", b"\n", b"5"]
CONTENTS += [b"version https://git-lfs.github.com/spec/v1\n", b"\xef\xbb\xbf{}", b'"\\ud83d"', None]


def damage_bytes(data, folder):
    """Another content or none, the file cut short, or some bytes in place of one."""
    file = data.draw(st.sampled_from(sorted(folder.iterdir())), label="file")
    content = file.read_bytes()
    where = data.draw(st.integers(0, 400) | st.integers(0, max(len(content) - 1, 0)))
    new = data.draw(st.binary(max_size=9))
    pieces = content[:where] + new + content[where + 1 :]
    content = data.draw(st.sampled_from([content[:where], pieces, *CONTENTS]))
    file.unlink() if content is None else file.write_bytes(content)


# What becomes of a tensor


def damage_tensors(data, folder):
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))), label="shard")
    tensors = load_file(file)
    name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
    tensor = tensors.pop(name)
    kind = data.draw(st.sampled_from(["drop", "rename", "shape", "dtype", "values", "double"]))
    if kind == "rename":
        tensors[data.draw(st.text(max_size=9) | st.just("lm_head.weight"))] = tensor
    elif kind == "shape":
        shape = data.draw(st.sampled_from([(0,), (1,), (), (2, 2, 2), (1, *tensor.shape)]))
        tensors[name] = torch.ones(shape)
    elif kind == "dtype":
        dtypes = [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e5m2]
        tensors[name] = tensor.to(data.draw(st.sampled_from(dtypes)))
    elif kind == "values":
        tensors[name] = tensor * data.draw(FLOATS)
    elif kind == "double":
        tensors |= {name: tensor, "model.norm.weight": torch.ones(8), "a.b": torch.ones(1)}
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


DAMAGES = [damage_json, damage_tensors, damage_bytes]  # in this order


@pytest.mark.parametrize("layout", ["LLaDA", "Dream"])
def test_what_is_not_damaged_decodes(tmp_path, layout):
    assert isinstance(outcome(whole(tmp_path, layout)), str)


@pytest.mark.parametrize("layout", ["LLaDA", "Dream"])
@given(data=st.data())
def test_a_damaged_checkpoint_decodes_or_is_refused_in_a_few_lines(tmp_path_factory, layout, data):
    folder = whole(tmp_path_factory.mktemp("damaged"), layout)
    damages = data.draw(st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=2))
    for damage in sorted(damages, key=DAMAGES.index):
        damage(data, folder)
    model_first = data.draw(st.booleans(), label="model first")
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        outcome(folder, model_first)
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError, repr(error)
        assert len(message.splitlines()) <= 5 and len(message) <= 1500, message
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # 1 GiB

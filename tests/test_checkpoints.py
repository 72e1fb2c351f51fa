"""Checkpoints written here, good and bad, against what the loader makes of them: the same numbers
bit for bit, or one ValueError that names the culprit and its value."""

import json
import re
import tempfile
import unicodedata
from dataclasses import MISSING, asdict, fields, replace
from itertools import cycle
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from huggingface_hub.utils import filter_repo_objects
from model import Config, Transformer, chat_prompt, chatml_prompt, encode_prompt, load_tokenizer
from safetensors import safe_open
from tokenizers import Tokenizer, models

import model as model_file
from strategies import model_specs
from tiny.train import save_tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PREFIX = "model.transformer."
INDEX = "model.safetensors.index.json"
FIELDS = [field.name for field in fields(Config) if field.name != "other_end_ids"]
NEEDED = [field.name for field in fields(Config) if field.default is MISSING]

# config.json of LLaDA-8B-Instruct.
LLADA = json.loads("""{
    "activation_type": "silu", "alibi": false, "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0, "attention_layer_norm": false,
    "attention_layer_norm_with_affine": true,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
                 "AutoModel": "modeling_llada.LLaDAModelLM",
                 "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081,
    "flash_attention": false, "include_bias": false, "include_qkv_bias": false,
    "init_cutoff_factor": null, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "input_emb_norm": false, "layer_norm_type": "rms", "layer_norm_with_affine": true,
    "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4,
    "model_type": "llada", "multi_query_attention": null, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05, "rope": true, "rope_full_precision": true, "rope_theta": 500000.0,
    "scale_logits": false, "transformers_version": "4.46.3", "use_cache": false,
    "vocab_size": 126464, "weight_tying": false
}""")
TINY = LLADA | {"d_model": 8, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 6}
TINY |= {"vocab_size": 11, "embedding_size": 12, "mask_token_id": 11, "eos_token_id": 0}

# Key by key, what other models of the family do and this one does not.
OTHER = {"activation_type": "gelu", "block_group_size": 2, "block_type": "sequential"}
OTHER |= {"clip_qkv": 8.0, "layer_norm_type": "low_precision", "multi_query_attention": True}
OTHER |= {"layer_norm_with_affine": False, "rope": False, "rope_full_precision": False}
OTHER |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 4096}
OTHER |= {"alibi": True, "attention_layer_norm": True, "bias_for_layer_norm": True}
OTHER |= {"include_bias": True, "input_emb_norm": True, "scale_logits": True}

# config.json of Dream-7B, iLLaDA-8B and Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm, made tiny.
HF = {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 8, "initializer_range": 0.02}
HF |= {"intermediate_size": 6, "max_position_embeddings": 4096, "num_attention_heads": 4}
HF |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "use_cache": True}
HF |= {"bos_token_id": 8, "eos_token_id": 9, "rope_scaling": None, "vocab_size": 12}
DREAM = HF | {"architectures": ["DreamModel"], "model_type": "Dream", "rope_theta": 1000000.0}
DREAM |= {"mask_token_id": 11, "max_window_layers": 3, "pad_token_id": 9, "sliding_window": None}
DREAM |= {"tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False}
ILLADA = HF | {"model_type": "illada", "attention_bias": False, "head_dim": 2, "mlp_bias": False}
ILLADA |= {"mask_token_id": 5, "rope_theta": 500000.0, "tie_word_embeddings": True}
CODER = HF | {"architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2"}
CODER |= {"layer_types": ["full_attention"] * 3, "max_window_layers": 3, "sliding_window": 32768}
CODER |= {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}
CODER |= {"tie_word_embeddings": True, "use_sliding_window": False}

# What they mean, where it is not what TINY says.
MEANING = {"n_layers": 3, "vocab_size": 12, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
MEANING = {field: TINY[field] for field in FIELDS} | MEANING | {"eos_token_id": 9}
LAYOUTS = {
    "Dream": (DREAM, {"include_qkv_bias": True}),
    "illada": (ILLADA, {"weight_tying": True, "mask_token_id": 5, "rope_theta": 5e5}),
    "a2d-qwen2": (CODER, {"include_qkv_bias": True, "weight_tying": True}),
}

# LLaDA's names in that layout.
OUTER = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
INNER = {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
INNER |= {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj"}
INNER |= {"attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj"}
INNER |= {"ff_out": "mlp.down_proj"}

# A tokenizer in Qwen2's three files: a letter for each byte (the space is Ġ, the newline Ċ, and the
# two bytes of é are Ã©), what the merges make of them, and two special tokens.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = {byte: chr(byte) for byte in PRINTABLE}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
MERGES = "h e,l l,Ġ t,t he,Ġt he,Ã ©,Ċ Ċ,4 2,' s,he ll,e ll".split(",")
VOCAB = [*LETTERS.values(), *(merge.replace(" ", "") for merge in MERGES)]
ADDED = {"<|im_end|>": len(VOCAB) + 1, "<|im_start|>": len(VOCAB)}
QWEN2 = {"vocab.json": json.dumps({token: i for i, token in enumerate(VOCAB)})}
QWEN2 |= {"merges.txt": "\n".join(MERGES), "added_tokens.json": json.dumps(ADDED)}


def tensor_shapes(config):
    """Names and shapes of the tensors in a checkpoint in LLaDA's layout."""
    C, M, V = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = C // config["n_heads"] * config["n_kv_heads"]
    block = {"attn_norm": (C,), "q_proj": (C, C), "k_proj": (kv, C), "v_proj": (kv, C)}
    block |= {"attn_out": (C, C), "ff_norm": (C,), "ff_proj": (M, C), "up_proj": (M, C)}
    block |= {"ff_out": (C, M)}
    shapes = {"wte": (V, C), "ln_f": (C,), "ff_out": (V, C)}
    for layer in range(config["n_layers"]):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes = {f"{PREFIX}{name}.weight": shape for name, shape in shapes.items()}
    if config["weight_tying"]:
        del shapes[PREFIX + "ff_out.weight"]
    if config["include_qkv_bias"]:
        for name in [name for name in shapes if name[:-7].endswith(("q_proj", "k_proj", "v_proj"))]:
            shapes[name.replace("weight", "bias")] = shapes[name][:1]
    return shapes


def make_tensors(config=TINY, dtype=torch.float32, seed=0):
    """Random tensors, all different, under the checkpoint's names."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def hf_name(name):
    """What Hugging Face's layout calls a tensor of LLaDA's."""
    *block, module, kind = name.removeprefix(PREFIX).split(".")
    return f"model.layers.{block[1]}.{INNER[module]}.{kind}" if block else f"{OUTER[module]}.{kind}"


def write_json(file, values):
    file.write_text(json.dumps(values), encoding="utf-8")


def write_checkpoint(folder, config=TINY, tensors=None, n_shards=None):
    """A checkpoint folder; with n_shards, tensor by tensor dealt to the shards in turn."""
    tensors = make_tensors() if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    if n_shards is None:
        save_tensors(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
    weight_map = dict(zip(tensors, cycle(files)))
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_tensors(held, folder / file)
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return folder


def write_layout(folder, layout, n_shards=None, change=None):
    """A checkpoint folder in one of the LAYOUTS.  -> folder, its Config, tensors by LLaDA's names

    change: {name in the folder: another tensor, or None to leave it out}.
    """
    values, meaning = LAYOUTS[layout]
    config = Config(**MEANING | meaning | {"model_type": layout})
    tensors = make_tensors(asdict(config))
    stored = {hf_name(name): tensor for name, tensor in tensors.items()} | (change or {})
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    write_words(write_checkpoint(folder, values, stored, n_shards), "abcdefghijkl")
    write_json(folder / "tokenizer_config.json", {"mask_token": "l"})
    return folder, config, tensors


def write_words(folder, words):
    """A tokenizer.json that gives every word its place in the list."""
    vocabulary = {word: i for i, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, words[0])).save(str(folder / "tokenizer.json"))


def write_qwen2(folder, **changes):
    """Qwen2's three files, some with other content; None leaves one out."""
    for file, content in (QWEN2 | changes).items():
        if content is not None:
            (folder / file).write_text(content, encoding="utf-8")
    return folder


def slow_bpe(word):
    """Ids of a word, by definition: while a merge applies, the first in the list, leftmost."""
    text = f" {' '.join(LETTERS[byte] for byte in word.encode())} "
    while merge := next((merge for merge in MERGES if f" {merge} " in text), None):
        text = text.replace(f" {merge} ", f" {merge.replace(' ', '')} ", 1)
    return [VOCAB.index(part) for part in text.split()]


def holds(model, tensors):
    """Whether the model's parameters are these tensors of a checkpoint, bit for bit."""
    found = {PREFIX + name: parameter for name, parameter in model.named_parameters()}
    return found.keys() == tensors.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in tensors.items()
    )


def refusal(path, load=Transformer.from_pretrained, **arguments):
    """The message of the ValueError raised, and of no special kind that slipped through."""
    with pytest.raises(ValueError) as caught:
        load(path, **arguments)
    assert type(caught.value) is ValueError, repr(caught.value)
    return str(caught.value)


# Good checkpoints


@given(model_specs(DTYPES), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 9))
def test_every_shape_survives_the_round_trip(spec, spare_rows, bias, tied, n_shards):
    config = replace(spec.config(), embedding_size=spec.vocab_size + spare_rows)
    config = replace(config, include_qkv_bias=bias, weight_tying=tied)
    tensors = make_tensors(asdict(config), spec.dtype, spec.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), LLADA | asdict(config), tensors, n_shards or None)
        loaded = Transformer.from_pretrained(folder)
    assert loaded.config == config and holds(loaded, tensors)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_given_dtype_converts_every_tensor(tmp_path, stored, dtype):
    tensors = make_tensors(dtype=stored)
    loaded = Transformer.from_pretrained(write_checkpoint(tmp_path, tensors=tensors), dtype=dtype)
    assert holds(loaded, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_parameters_are_frozen(tmp_path):
    loaded = Transformer.from_pretrained(write_checkpoint(tmp_path))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("n_shards", [None, 2])
def test_links_as_in_the_cache_of_the_hub_are_followed(tmp_path, n_shards):
    snapshot = write_checkpoint(tmp_path / "snapshot", n_shards=n_shards)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(tmp_path / "blobs" / f"abc{number}")
        file.symlink_to(f"../blobs/abc{number}")
    (tmp_path / "link").symlink_to("snapshot")
    assert holds(Transformer.from_pretrained(tmp_path / "link"), make_tensors())


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_tensors_read_become_parameters_of_an_empty_model_uncopied(tmp_path, monkeypatch, dtype):
    read, load, devices = model_file.read_tensors, torch.nn.Module.load_state_dict, set()
    pointers = {}

    def recording_read(*arguments):
        tensors = read(*arguments)
        pointers.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        return tensors

    def recording_load(module, *arguments, **settings):
        devices.update(parameter.device.type for parameter in module.parameters())
        return load(module, *arguments, **settings)

    monkeypatch.setattr(model_file, "read_tensors", recording_read)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", recording_load)
    loaded = Transformer.from_pretrained(write_checkpoint(tmp_path), dtype=dtype)
    assert devices == {"meta"}
    assert pointers == {PREFIX + name: p.data_ptr() for name, p in loaded.named_parameters()}


# config.json


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_dropout": 0.5, "init_device": "cuda", "pad_token_id": None, "use_cache": True},
        {"multi_query_attention": False, "rope_theta": 500000, "unheard_of": {"a": [1, 2]}},
    ],
)
def test_a_config_that_changes_no_logit_of_llada_8b_is_accepted(tmp_path, change):
    write_json(tmp_path / "config.json", LLADA | change)
    expected = Config(**{field: LLADA[field] for field in FIELDS})
    assert Config.from_json(tmp_path / "config.json") == expected


@pytest.mark.parametrize("key, value", OTHER.items())
def test_what_is_not_implemented_is_refused_by_key_and_value(tmp_path, key, value):
    message = refusal(write_checkpoint(tmp_path, TINY | {key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {key} is {value!r}, but only")


@pytest.mark.parametrize(
    "config, lost", [(TINY, ["rope_theta"]), (TINY, FIELDS), (DREAM, ["eos_token_id"])]
)
def test_all_missing_keys_are_named_at_once(tmp_path, config, lost):
    config = {key: value for key, value in config.items() if key not in lost}
    message = refusal(write_checkpoint(tmp_path, config))
    missing = [key for key in lost if key in NEEDED]
    assert message == f"{tmp_path / 'config.json'}: missing keys {missing}"


def test_a_config_silent_about_biases_and_tying_has_neither(tmp_path):
    config = {key: value for key, value in TINY.items() if key in NEEDED}
    loaded = Transformer.from_pretrained(write_checkpoint(tmp_path, config))
    assert loaded.config == Config(**{field: TINY[field] for field in FIELDS})


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("n_heads", "4", "n_heads is '4'"),
        ("n_layers", True, "n_layers is True"),
        ("mlp_hidden_size", 6.0, "mlp_hidden_size is 6.0"),
        ("d_model", -8, "d_model is -8"),
        ("rope_theta", float("nan"), "rope_theta is nan"),
        ("model_type", 5, "model_type is 5"),
        ("include_qkv_bias", 0, "include_qkv_bias is 0"),
        ("n_kv_heads", 0, "modulo by zero"),
        ("rms_norm_eps", None, "missing keys ['rms_norm_eps']"),
        ("d_model", 12, "d_model is 12, should be an even multiple of n_heads 4"),
        ("n_kv_heads", 3, "n_heads is 4, should be a multiple of n_kv_heads 3"),
        ("n_kv_heads", 8, "n_heads is 4, should be a multiple of n_kv_heads 8"),
        ("mask_token_id", 12, "mask_token_id is 12, should be from 0 to 11"),
        ("eos_token_id", 12, "eos_token_id is 12, should be from 0 to 11"),
        ("eos_token_id", -1, "eos_token_id is -1"),
    ],
)
def test_a_number_that_makes_no_transformer_is_refused(tmp_path, key, value, complaint):
    message = refusal(write_checkpoint(tmp_path, TINY | {key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and complaint in message


# Tensors and arguments


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tensors = make_tensors()
    del tensors[PREFIX + "ln_f.weight"], tensors[PREFIX + "blocks.1.up_proj.weight"]
    tensors["wte.weight"] = torch.zeros(12, 8)  # once taken for the one with the prefix
    tensors[PREFIX + "blocks.2.q_proj.weight"] = torch.zeros(8, 8)
    tensors[PREFIX + "wte.weight"] = torch.zeros(13, 8)
    tensors[PREFIX + "blocks.0.attn_norm.weight"] = torch.zeros(8, 1)
    message = refusal(write_checkpoint(tmp_path, tensors=tensors))
    assert message.startswith(f"{tmp_path}: the tensors do not fit config.json: ")
    missing, unexpected, shape, other_shape = message.splitlines()[1:]
    assert f'"{PREFIX}ln_f.weight"' in missing and f'"{PREFIX}blocks.1.up_proj.weight"' in missing
    assert '"wte.weight"' in unexpected and f'"{PREFIX}blocks.2.q_proj.weight"' in unexpected
    assert f"{PREFIX}wte.weight: " in shape and "[13, 8]" in shape and "[12, 8]" in shape
    assert f"{PREFIX}blocks.0.attn_norm.weight: " in other_shape


@pytest.mark.parametrize("stored", [torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_tensor_that_is_no_float_of_16_bits_or_more_is_refused(tmp_path, stored, dtype):
    tensors, name = make_tensors(), PREFIX + "blocks.1.ff_proj.weight"
    tensors[name] = tensors[name].to(stored)
    message = refusal(write_checkpoint(tmp_path, tensors=tensors), dtype=dtype)
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: dtype {stored} of {name} is")


def test_mixed_dtypes_are_refused_unless_one_is_asked_for(tmp_path):
    tensors, name = make_tensors(dtype=torch.bfloat16), PREFIX + "wte.weight"
    tensors[name] = tensors[name].float()
    message = refusal(write_checkpoint(tmp_path, tensors=tensors, n_shards=2))
    assert message.startswith(f"{tmp_path}: mixes {{torch.")
    assert "torch.float32" in message and "torch.bfloat16" in message
    loaded = Transformer.from_pretrained(tmp_path, dtype=torch.float64)
    assert holds(loaded, {name: tensor.double() for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"dtype": "float32"}, "dtype is float32"),
        ({"device": "foo"}, "device is 'foo'"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
    ],
)
def test_a_dtype_or_device_out_of_the_question_is_named(tmp_path, arguments, complaint):
    assert refusal(write_checkpoint(tmp_path), **arguments).startswith(complaint)


# The layout of Hugging Face's Llama


@pytest.mark.parametrize("n_shards", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_layout_is_the_same_model_as_in_lladas_own(tmp_path, layout, n_shards):
    """That one with a head of its own, so that a tied head is seen to be the embedding."""
    folder, config, tensors = write_layout(tmp_path / "other", layout, n_shards=n_shards)
    loaded = Transformer.from_pretrained(folder)
    assert loaded.config == config and holds(loaded, tensors)
    head = {PREFIX + "ff_out.weight": tensors[PREFIX + "wte.weight"]} if config.weight_tying else {}
    own = LLADA | asdict(replace(config, weight_tying=False))
    own = Transformer.from_pretrained(write_checkpoint(tmp_path / "own", own, tensors | head))
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens), own(tokens))


@pytest.mark.parametrize("kind", ["llada", *LAYOUTS])
def test_only_the_logits_of_dream_are_shifted(tmp_path, kind):
    write_json(tmp_path / "config.json", DREAM | {"model_type": kind})
    assert Config.from_json(tmp_path / "config.json").shifted == (kind == "Dream")


@pytest.mark.parametrize("layout", ["illada", "a2d-qwen2"])
def test_a_head_beside_an_embedding_tied_to_it_is_ignored(tmp_path, layout):
    change = {"lm_head.weight": torch.zeros(12, 8)}
    folder, _, tensors = write_layout(tmp_path, layout, change=change)
    assert holds(Transformer.from_pretrained(folder), tensors)


def test_every_tensor_that_does_not_fit_is_listed_under_its_name_in_lladas_layout(tmp_path):
    change = {"lm_head.weight": None, "model.layers.1.mlp.up_proj.weight": None}
    change["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(8)
    change["model.layers.3.mlp.up_proj.weight"] = torch.zeros(6, 8)
    change["some.other.weight"] = torch.zeros(8)
    change["model.norm.weight"] = torch.zeros(9)
    change["model.layers.1.self_attn.k_proj.bias"] = torch.zeros(8)
    message = refusal(write_layout(tmp_path, "Dream", change=change)[0])
    missing, unexpected, *shapes = message.splitlines()[1:]
    names = {name: re.findall(r'"([^"]+)"', name) for name in (missing, unexpected)}
    assert set(names[missing]) == {PREFIX + "ff_out.weight", PREFIX + "blocks.1.up_proj.weight"}
    assert set(names[unexpected]) == {
        PREFIX + "blocks.0.attn_out.bias",
        PREFIX + "blocks.3.up_proj.weight",
        "some.other.weight",
    }
    assert {re.search("size mismatch for ([^:]+)", line)[1] for line in shapes} == {
        PREFIX + "ln_f.weight",
        PREFIX + "blocks.1.k_proj.bias",
    }


def test_a_tensor_under_both_of_its_names_is_refused(tmp_path):
    folder, _, _ = write_layout(tmp_path, "Dream", change={PREFIX + "ln_f.weight": torch.zeros(8)})
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: ") and "already" in message


@pytest.mark.parametrize("layer", [0, 1])
def test_biases_are_in_all_layers_or_in_none(tmp_path, layer):
    lost = [f"model.layers.{layer}.self_attn.{name}_proj.bias" for name in "qkv"]
    message = refusal(write_layout(tmp_path, "Dream", change=dict.fromkeys(lost))[0])
    missing = re.findall(r'"([^"]+)"', message)
    assert missing == [f"{PREFIX}blocks.{layer}.{name}_proj.bias" for name in "qkv"]


def test_biases_that_the_config_promises_are_missed(tmp_path):
    message = refusal(write_checkpoint(tmp_path, TINY | {"include_qkv_bias": True}, make_tensors()))
    assert f'"{PREFIX}blocks.0.q_proj.bias"' in message


YARN = {"rope_theta": 1000000.0, "rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "values, change, complaint",
    [
        (DREAM, {"hidden_act": "gelu"}, "hidden_act is 'gelu', but"),
        (DREAM, {"rope_scaling": YARN}, f"rope_scaling is {YARN}, but"),
        (CODER, {"rope_parameters": YARN}, "rope_type is 'yarn', but"),
        (CODER, {"use_sliding_window": True}, "sliding_window is 32768, but"),
        (DREAM, {"use_mrope": True}, "use_mrope is True, but"),
        (ILLADA, {"mlp_bias": True}, "mlp_bias is True, but"),
    ],
)
def test_what_is_not_implemented_of_that_layout_is_refused(tmp_path, values, change, complaint):
    message = refusal(write_checkpoint(tmp_path, values | change))
    assert message.startswith(f"{tmp_path / 'config.json'}: {complaint}")


# What the tokenizer's files say of the ids


@pytest.mark.parametrize("config", [TINY | {"vocab_size": 12}, DREAM], ids=["LLaDA", "Dream"])
@pytest.mark.parametrize("words, vocab_size", [(0, 12), (10, 10), (12, 12), (13, 12)])
def test_only_ids_that_have_a_token_are_in_the_vocabulary(tmp_path, config, words, vocab_size):
    write_json(tmp_path / "config.json", config)
    if words:  # of which the first two are one: an id in between has no token
        write_words(tmp_path, "aacdefghijklm"[:words])
    config = Config.from_json(tmp_path / "config.json")
    assert (config.vocab_size, config.embedding_size) == (vocab_size, 12)


def test_added_tokens_are_in_the_vocabulary(tmp_path):
    write_json(write_qwen2(tmp_path) / "config.json", DREAM | {"vocab_size": 300})
    config = Config.from_json(tmp_path / "config.json")
    assert (config.vocab_size, config.embedding_size) == (1 + ADDED["<|im_end|>"], 300)


@pytest.mark.parametrize("token", ["c", {"content": "c", "lstrip": False, "special": True}])
@pytest.mark.parametrize("own, meant", [("absent", 2), (None, 2), (0, 0)])
def test_the_mask_is_that_of_the_tokenizer_unless_config_has_one(tmp_path, own, meant, token):
    said = {} if own == "absent" else {"mask_token_id": own}
    write_json(tmp_path / "config.json", CODER | said)
    write_json(tmp_path / "tokenizer_config.json", {"mask_token": token, "pad_token": "b"})
    write_words(tmp_path, "abcdefgh")
    assert Config.from_json(tmp_path / "config.json").mask_token_id == meant


@pytest.mark.parametrize(
    "about", [{}, *({"mask_token": token} for token in (None, "x", {}, {"content": 5}, 5))]
)
def test_a_mask_that_is_no_token_is_a_mask_that_is_missing(tmp_path, about):
    """No mask once was the token of the word None, which Qwen2's vocabulary has."""
    write_json(write_checkpoint(tmp_path, CODER) / "tokenizer_config.json", about)
    write_words(tmp_path, ["a", "None", "{}"])
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and "mask_token_id" in message


# Files


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00002-of-00003.safetensors"])
def test_a_missing_file_is_named(tmp_path, file):
    (write_checkpoint(tmp_path, n_shards=3) / file).unlink()
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path)) and file in message


@pytest.mark.parametrize(
    "content, reason",
    [
        pytest.param(b'{"d_model": 8,', "Expecting property name", id="truncated"),
        pytest.param(b"\xff\xfe\x00", "can't decode byte 0xff", id="binary"),
        pytest.param(b"[" * 100_000, "recursion", id="endless-nesting"),
        pytest.param(b"[1, 2]", "should hold a JSON object", id="list"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, file, content, reason):
    (write_checkpoint(tmp_path, n_shards=2) / file).write_bytes(content)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / file}: ") and reason in message


@given(st.integers(0, 10**6))
@example(0)
@example(8)
def test_a_file_cut_short_anywhere_is_refused(tmp_path_factory, length):
    file = write_checkpoint(tmp_path_factory.mktemp("cut")) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: length % len(whole)])
    assert refusal(file.parent).startswith(f"{file}: missing, truncated or corrupt")


@pytest.mark.parametrize("index", [{}, {"weight_map": ["wte"]}])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    write_json(write_checkpoint(tmp_path, n_shards=2) / INDEX, index)
    assert refusal(tmp_path) == f"{tmp_path / INDEX}: has no weight_map"


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path):
    index = write_checkpoint(tmp_path, n_shards=2) / INDEX
    shard = "model-00002-of-00002.safetensors"
    write_json(index, {"weight_map": dict.fromkeys(make_tensors(), shard)})
    with safe_open(tmp_path / shard, framework="pt") as stored:
        lost = set(make_tensors()) - set(stored.keys())
    assert lost and all(f'"{name}"' in refusal(tmp_path) for name in lost)


@pytest.mark.parametrize("shard", ["../x", "/x", "a/b", "", ".", "..", None, ["x"]])
def test_no_file_outside_the_folder_is_opened(tmp_path, monkeypatch, shard):
    index = write_checkpoint(tmp_path, n_shards=1) / INDEX
    write_json(index, {"weight_map": dict.fromkeys(make_tensors(), shard)})
    monkeypatch.setattr(model_file, "safe_open", None)
    assert refusal(tmp_path).startswith(f"{index}: shard {shard!r} should be")


# The hub


def test_only_json_safetensors_and_merges_are_downloaded(tmp_path, monkeypatch):
    download = Mock(return_value=str(write_checkpoint(tmp_path)))
    monkeypatch.setattr(model_file, "snapshot_download", download)
    assert holds(Transformer.from_pretrained("GSAI-ML/LLaDA-8B-Instruct"), make_tensors())
    data = ["config.json", "model-00001-of-00006.safetensors", INDEX, "vocab.json", "merges.txt"]
    other = ["modeling_llada.py", "pytorch_model.bin", "README.md", "a.pkl", "json.exe", "a.txt"]
    assert download.call_args.args == ("GSAI-ML/LLaDA-8B-Instruct",)
    assert list(filter_repo_objects(data + other, **download.call_args.kwargs)) == data


@pytest.mark.parametrize("load", [Transformer.from_pretrained, load_tokenizer])
@pytest.mark.parametrize("path", ["nobody/no-such-model", "no/such/folder", "a\0b", ""])
def test_what_is_neither_folder_nor_repository_is_named(tmp_path, monkeypatch, load, path):
    """The empty path once was the current folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(write_checkpoint(tmp_path))
    assert refusal(path, load).startswith(f"{path!r} is no local folder")


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_download_that_fails_names_repository_and_reason(monkeypatch, kind):
    download = Mock(side_effect=kind("the reason\nand a page of advice"))
    monkeypatch.setattr(model_file, "snapshot_download", download)
    message = refusal("some/model")
    assert message.startswith("'some/model' is") and message.endswith("the reason")


# Tokenizer and prompt


def test_a_tokenizer_is_the_one_of_the_file(tmp_path):
    write_words(tmp_path, ["[UNK]", "moon", "rises"])
    assert load_tokenizer(tmp_path).get_vocab() == {"[UNK]": 0, "moon": 1, "rises": 2}


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe"])
def test_a_missing_or_corrupt_tokenizer_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    assert refusal(tmp_path, load_tokenizer).startswith(f"{file}: no readable tokenizer (")


def test_of_two_tokenizers_the_one_in_a_single_file_counts(tmp_path):
    write_words(write_qwen2(tmp_path), ["moon"])
    assert load_tokenizer(tmp_path).get_vocab() == {"moon": 0}


@pytest.mark.parametrize(
    "text, words",
    [
        ("the hello thehell", ["the", " hello", " thehell"]),
        ("it'sa IT'LLx 'sa", ["it", "'s", "a", " IT", "'LL", "x", " '", "sa"]),
        ("a 42 b42", ["a", " ", "4", "2", " b", "4", "2"]),
        ("x\n\n  y \n z  ", ["x", "\n\n", " ", " y", " \n", " z", "  "]),
        ("a.\n\nb (the) 's -the", ["a", ".\n\n", "b", " (", "the", ")", " '", "s", " -", "the"]),
        ("(the\tthe", ["(the", "\tthe"]),
        ("caf\xe9 cafe\u0301 \xb2", ["caf\xe9", " caf\xe9", " ", "\xb2"]),
    ],
)
def test_a_text_is_cut_into_the_words_of_qwen2_and_each_is_merged(tmp_path, text, words):
    encoding = load_tokenizer(write_qwen2(tmp_path)).encode(text, add_special_tokens=False)
    numbers = zip(encoding.word_ids, encoding.ids)
    expected = [(number, id) for number, word in enumerate(words) for id in slow_bpe(word)]
    assert list(numbers) == expected


def test_special_tokens_have_their_own_ids_and_leave_no_text(tmp_path):
    tokenizer = load_tokenizer(write_qwen2(tmp_path))
    ids = tokenizer.encode("<|im_start|>the<|im_end|>\n <|im_start|>").ids
    start, end = ADDED["<|im_start|>"], ADDED["<|im_end|>"]
    assert ids == [start, *slow_bpe("the"), end, *slow_bpe("\n"), *slow_bpe(" "), start]
    assert tokenizer.decode(ids) == "the\n "


PIECES = st.sampled_from(["the", " hello", "'s", "42", "\n", " ", "e\u0301", *ADDED])


@given(st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=5)))
def test_decoding_gives_the_composed_text_back(tmp_path_factory, pieces):
    tokenizer = load_tokenizer(write_qwen2(tmp_path_factory.getbasetemp()))
    text = unicodedata.normalize("NFC", "".join(pieces))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("wrong", [len(VOCAB) + 2, 5])
def test_an_added_token_whose_id_it_cannot_get_is_named(tmp_path, wrong):
    added = {"<|im_start|>": len(VOCAB), "<|im_end|>": wrong}
    write_qwen2(tmp_path, **{"added_tokens.json": json.dumps(added)})
    message = refusal(tmp_path, load_tokenizer)
    assert message.startswith(str(tmp_path)) and "<|im_end|>" in message


@pytest.mark.parametrize("content", [None, "a b c", "[]"])
@pytest.mark.parametrize("file", QWEN2)
def test_a_missing_or_corrupt_file_of_qwen2s_three_is_refused(tmp_path, file, content):
    message = refusal(write_qwen2(tmp_path, **{file: content}), load_tokenizer)
    assert message.startswith(str(tmp_path)) and "no readable tokenizer (" in message


def test_a_conversation_is_told_turn_by_turn_as_in_the_template_of_llada():
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " \tTwo lines:\n\nhere. \n"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    assert chat_prompt(messages) == (
        "<|startoftext|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo lines:\n\nhere.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_chat_prompt_is_the_canonical_one():
    """The text whose ids LLaDA's authors publish: two newlines behind a header, none before one."""
    question = (
        "Lily can run 12 kilometers per hour for 4 hours. After that, she runs 6 kilometers per "
        "hour. How many kilometers can she run in 8 hours?"
    )
    assert chat_prompt([{"role": "user", "content": f" {question}\n"}]) == (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml_is_told_turn_by_turn_from_a_system_message_on():
    messages = [{"role": "user", "content": " {a}\n"}, {"role": "assistant", "content": "Yes."}]
    turns = "<|im_start|>user\n {a}\n<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    turns += "<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert chatml_prompt(messages) == default + turns
    told = chatml_prompt([{"role": "system", "content": " Be brief.\n"}, *messages])
    assert told == "<|im_start|>system\n Be brief.\n<|im_end|>\n" + turns


TEMPLATES = {"<|start_header_id|>": chat_prompt, "<|im_start|>": chatml_prompt}


@pytest.mark.parametrize("token", [*TEMPLATES, "<|something_else|>"])
def test_a_prompt_is_put_into_the_chat_template_whose_tokens_the_tokenizer_has(token):
    told = TEMPLATES.get(token, chat_prompt)([{"role": "user", "content": "Why?"}])
    vocabulary = {"<unk>": 6, "Why?": 7, told: 8, token: 9}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    assert encode_prompt(tokenizer, "Why?").tolist() == [[8 if token in TEMPLATES else 7]]

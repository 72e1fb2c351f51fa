"""Checkpoints written here, good and bad, against what the loader makes of them: the same numbers
bit for bit, or one ValueError that names the culprit and its value."""

import json
import tempfile
from dataclasses import asdict, fields, replace
from itertools import cycle
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from huggingface_hub.utils import filter_repo_objects
from model import Config, Transformer, chat_prompt, encode_prompt, load_tokenizer
from tokenizers import Tokenizer, models

import model as model_file
from strategies import model_specs
from tiny.train import save_tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PREFIX = "model.transformer."
INDEX = "model.safetensors.index.json"
FIELDS = [field.name for field in fields(Config)]

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
OTHER |= {"include_bias": True, "include_qkv_bias": True, "input_emb_norm": True}
OTHER |= {"scale_logits": True, "weight_tying": True}


def tensor_shapes(config):
    """Names and shapes of the tensors in a LLaDA checkpoint."""
    C, M, V = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = C // config["n_heads"] * config["n_kv_heads"]
    block = {"attn_norm": (C,), "q_proj": (C, C), "k_proj": (kv, C), "v_proj": (kv, C)}
    block |= {"attn_out": (C, C), "ff_norm": (C,), "ff_proj": (M, C), "up_proj": (M, C)}
    block |= {"ff_out": (C, M)}
    shapes = {"wte": (V, C), "ln_f": (C,), "ff_out": (V, C)}
    for layer in range(config["n_layers"]):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{PREFIX}{name}.weight": shape for name, shape in shapes.items()}


def make_tensors(config=TINY, dtype=torch.float32, seed=0):
    """Random tensors, all different, under the checkpoint's names."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for name, shape in tensor_shapes(config).items()
    }


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


@given(model_specs(DTYPES), st.integers(0, 3), st.none() | st.integers(1, 9))
def test_every_shape_survives_the_round_trip(spec, spare_rows, n_shards):
    config = replace(spec.config(), embedding_size=spec.vocab_size + spare_rows)
    tensors = make_tensors(asdict(config), spec.dtype, spec.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), LLADA | asdict(config), tensors, n_shards)
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
    check, read = model_file.check_tensors, {}

    def recording(found, expected, folder):
        check(found, expected, folder)
        read.update({name: (expected[name].device.type, found[name].data_ptr()) for name in found})

    monkeypatch.setattr(model_file, "check_tensors", recording)
    loaded = Transformer.from_pretrained(write_checkpoint(tmp_path), dtype=dtype)
    assert read == {PREFIX + name: ("meta", p.data_ptr()) for name, p in loaded.named_parameters()}


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


@pytest.mark.parametrize("lost", [["rope_theta"], FIELDS])
def test_all_missing_keys_are_named_at_once(tmp_path, lost):
    config = {key: value for key, value in TINY.items() if key not in lost}
    message = refusal(write_checkpoint(tmp_path, config))
    assert message == f"{tmp_path / 'config.json'}: missing keys {lost}"


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("n_heads", "4", "n_heads is '4'"),
        ("n_layers", True, "n_layers is True"),
        ("n_kv_heads", 0, "n_kv_heads is 0"),
        ("mlp_hidden_size", 6.0, "mlp_hidden_size is 6.0"),
        ("max_sequence_length", 2**31, "max_sequence_length is 2147483648"),
        ("eos_token_id", -1, "eos_token_id is -1"),
        ("rms_norm_eps", None, "rms_norm_eps is None"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps is inf"),
        ("rope_theta", float("nan"), "rope_theta is nan"),
        ("rope_theta", 0, "rope_theta is 0"),
        ("d_model", 12, "d_model is 12, should be an even multiple of n_heads 4"),
        ("n_kv_heads", 3, "n_heads is 4, should be a multiple of n_kv_heads 3"),
        ("n_kv_heads", 8, "n_heads is 4, should be a multiple of n_kv_heads 8"),
        ("mask_token_id", 12, "mask_token_id is 12, should be at most 11"),
        ("eos_token_id", 12, "eos_token_id is 12, should be at most 11"),
        ("vocab_size", 13, "vocab_size is 13, should be at most 12"),
    ],
)
def test_a_number_that_makes_no_transformer_is_refused(tmp_path, key, value, complaint):
    message = refusal(write_checkpoint(tmp_path, TINY | {key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {complaint}")


# Tensors and arguments


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tensors = make_tensors()
    del tensors[PREFIX + "ln_f.weight"], tensors[PREFIX + "blocks.1.up_proj.weight"]
    tensors["wte.weight"] = torch.zeros(12, 8)  # once taken for the one with the prefix
    tensors[PREFIX + "blocks.2.q_proj.weight"] = torch.zeros(8, 8)
    tensors[PREFIX + "blocks.0.q_proj.bias"] = torch.zeros(8)
    tensors[PREFIX + "wte.weight"] = torch.zeros(13, 8)
    tensors[PREFIX + "blocks.0.attn_norm.weight"] = torch.zeros(8, 1)
    folder, complaints = refusal(write_checkpoint(tmp_path, tensors=tensors)).split(": ", 1)
    assert folder == str(tmp_path)
    assert set(complaints.removeprefix("the tensors do not fit config.json: ").split("; ")) == {
        f"missing {PREFIX}ln_f.weight",
        f"missing {PREFIX}blocks.1.up_proj.weight",
        "unexpected wte.weight",
        f"unexpected {PREFIX}blocks.2.q_proj.weight",
        f"unexpected {PREFIX}blocks.0.q_proj.bias",
        f"{PREFIX}wte.weight is (13, 8), should be (12, 8)",
        f"{PREFIX}blocks.0.attn_norm.weight is (8, 1), should be (8,)",
    }


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
    assert message.startswith(f"{tmp_path}: mixes dtypes")
    assert all(culprit in message for culprit in (name, "torch.float32", "torch.bfloat16"))
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
        pytest.param(b"[1, 2]", "holds list", id="list"),
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


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path):
    index = write_checkpoint(tmp_path, n_shards=2) / INDEX
    name, shard = PREFIX + "wte.weight", "model-00002-of-00002.safetensors"
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    write_json(index, {"weight_map": weight_map | {name: shard}})
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / shard}: ") and name in message


@pytest.mark.parametrize("shard", ["../x", "/x", "a/b", "..\\x", "", ".", "..", None, ["x"]])
def test_no_file_outside_the_folder_is_opened(tmp_path, monkeypatch, shard):
    index = write_checkpoint(tmp_path, n_shards=1) / INDEX
    write_json(index, {"weight_map": dict.fromkeys(make_tensors(), shard)})
    monkeypatch.setattr(model_file, "safe_open", None)
    assert refusal(tmp_path).startswith(f"{index}: shard {shard!r} should be")


# The hub


def test_only_json_and_safetensors_are_downloaded(tmp_path, monkeypatch):
    download = Mock(return_value=str(write_checkpoint(tmp_path)))
    monkeypatch.setattr(model_file, "snapshot_download", download)
    assert holds(Transformer.from_pretrained("GSAI-ML/LLaDA-8B-Instruct"), make_tensors())
    data = ["config.json", "model-00001-of-00006.safetensors", INDEX]
    other = ["modeling_llada.py", "pytorch_model.bin", "README.md", "a.pkl", "json.exe"]
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
    vocabulary = {"[UNK]": 0, "moon": 1, "rises": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).get_vocab() == vocabulary


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe"])
def test_a_missing_or_corrupt_tokenizer_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    assert refusal(tmp_path, load_tokenizer).startswith(f"{file}: no readable tokenizer (")


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


@pytest.mark.parametrize("header", ["<|start_header_id|>", "<|something_else|>"])
def test_a_prompt_is_put_into_the_chat_template_if_the_tokenizer_has_its_tokens(header):
    template = chat_prompt([{"role": "user", "content": "Why?"}])
    tokenizer = Tokenizer(models.WordLevel({"Why?": 7, template: 8, header: 9}, unk_token="Why?"))
    assert encode_prompt(tokenizer, "Why?").tolist() == [[8 if "start" in header else 7]]

"""Checkpoints written here, good and bad, against what the loader makes of them: the same numbers
bit for bit, or one ValueError that names the culprit and its value."""

import dataclasses
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from checkpoints import (
    ADDED,
    CODER,
    DREAM,
    DTYPES,
    FIELDS,
    ILLADA,
    INDEX,
    LAYOUTS,
    LLADA,
    NEEDED,
    PREFIX,
    TINY,
    hf_name,
    make_tensors,
    refusal,
    write_checkpoint,
    write_json,
    write_layout,
    write_llada_tokenizer,
    write_qwen2,
    write_words,
)
from hypothesis import example, given
from hypothesis import strategies as st
from huggingface_hub.utils import filter_repo_objects
from model import Config, Transformer, load_tokenizer
from safetensors import safe_open
from tokenizers import Tokenizer, models

import model as model_file
from strategies import model_specs


def holds(model, tensors):
    """Whether the model's parameters are these tensors of a checkpoint, bit for bit."""
    found = {PREFIX + name: parameter for name, parameter in model.named_parameters()}
    return found.keys() == tensors.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in tensors.items()
    )


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


# Key by key, what the classes LLaDAConfig, LlamaConfig, Qwen2Config, DreamConfig and ILLaDAConfig
# have: obeyed, that is, a field of Config ...
OBEYED = {
    "LLaDA": {
        "d_model": 16, "n_layers": 5, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 7,
        "vocab_size": 9, "embedding_size": 13, "max_sequence_length": 77, "rope_theta": 1e4,
        "rms_norm_eps": 1e-4, "mask_token_id": 3, "eos_token_id": 4, "include_qkv_bias": True,
        "weight_tying": True, "model_type": "illada",
    },
    "HF": {
        "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 7, "vocab_size": 13,
        "max_position_embeddings": 77, "rope_theta": 1e4, "rms_norm_eps": 1e-4, "mask_token_id": 3,
        "eos_token_id": 4, "tie_word_embeddings": True, "model_type": "illada",
    },
}  # fmt: skip
# ... refused, because it asks for another computation (and what else of that kind there is) ...
REFUSED = {
    "LLaDA": {
        "activation_type": "gelu", "alibi": True, "attention_layer_norm": True,
        "bias_for_layer_norm": True, "block_group_size": 2, "block_type": "sequential",
        "clip_qkv": 8.0, "include_bias": True, "input_emb_norm": True,
        "layer_norm_type": "low_precision", "layer_norm_with_affine": False,
        "multi_query_attention": True, "rope": False, "rope_full_precision": False,
        "scale_logits": True,
    },
    "HF": {
        "attention_bias": False, "head_dim": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_bias": True, "model_type": "qwen2", "rope_parameters": {"type": "yarn"},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window": 4096,
        "use_mrope": True,
    },
    "both": {
        "attention_multiplier": 0.1, "attn_logit_softcapping": 50.0,
        "compression_config": {"format": "int"}, "embedding_multiplier": 12.0,
        "final_logit_softcapping": 30.0, "logit_scale": 0.06, "logits_scaling": 8.0,
        "n_routed_experts": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "num_local_experts": 8, "partial_rotary_factor": 0.5, "qk_layernorm": True,
        "qk_norm": True, "quantization": {"bits": 8}, "quantization_config": {"bits": 4},
        "residual_multiplier": 0.2, "rope_type": "yarn", "rotary_pct": 0.25, "use_qk_norm": True,
    },
}  # fmt: skip
# ... or without influence on a logit.
FREE = {
    "LLaDA": {
        "alibi_bias_max": 1.0, "attention_dropout": 0.5, "attention_layer_norm_with_affine": False,
        "embedding_dropout": 0.5, "flash_attention": True, "init_cutoff_factor": 3.0,
        "init_device": "cuda", "init_fn": "normal", "init_std": 1.0, "mlp_ratio": 9,
        "precision": "fp32", "residual_dropout": 0.5,
    },
    "HF": {
        "attention_dropout": 0.5, "initializer_range": 1.0, "max_window_layers": 1,
        "pretraining_tp": 2, "resid_pdrop": 0.5, "use_sliding_window": False,
    },
    "both": {
        "architectures": ["X"], "auto_map": {"AutoModel": "x.X"}, "bos_token_id": 1,
        "dtype": "float16", "pad_token_id": None, "torch_dtype": "float16",
        "transformers_version": "0", "unheard_of": {"a": [1, 2]}, "use_cache": None,
    },
}  # fmt: skip
# Values that say the same as a key's absence.
HARMLESS = [
    {},
    {"multi_query_attention": False, "rope_theta": 500000, "quantization_config": {}},
    {"rope_scaling": {"rope_type": "default"}, "num_experts": 0, "layer_types": None},
    {"rope_scaling": {"type": "default", "factor": 1.0, "rope_theta": 500000.0}},
    {"rope_scaling": {"rope_type": "default", "factor": None}, "rope_parameters": {}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
    {"sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"] * 32},
]
CLASSES = {"LLaDA": TINY, "HF": DREAM}


def of_class(table):
    """[(name of a class, key, value)] of one of the tables above."""
    return [
        pytest.param(name, key, value, id=f"{name}-{key}")
        for name in CLASSES
        for key, value in (table[name] | table.get("both", {})).items()
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_each_key_is_obeyed_or_refused_or_without_influence(name):
    tables = [table[name] | table.get("both", {}) for table in (OBEYED, REFUSED, FREE)]
    released = {"LLaDA": LLADA, "HF": DREAM | ILLADA | CODER}[name]
    assert released.keys() <= set().union(*tables)


@pytest.mark.parametrize("name, key, value", of_class(OBEYED))
def test_a_key_that_is_obeyed_changes_the_config(tmp_path, name, key, value):
    write_json(tmp_path / "a.json", CLASSES[name])
    write_json(tmp_path / "b.json", CLASSES[name] | {key: value})
    before, after = Config.from_json(tmp_path / "a.json"), Config.from_json(tmp_path / "b.json")
    assert before != after


@pytest.mark.parametrize("name, key, value", of_class(REFUSED))
def test_a_key_that_asks_for_another_computation_is_refused(tmp_path, name, key, value):
    config = {k: v for k, v in CLASSES[name].items() if k != "use_sliding_window"}
    message = refusal(write_checkpoint(tmp_path, config | {key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {key} is {value!r}, but only")


@pytest.mark.parametrize("name, key, value", of_class(FREE))
def test_a_key_without_influence_changes_no_config(tmp_path, name, key, value):
    write_json(tmp_path / "a.json", CLASSES[name])
    write_json(tmp_path / "b.json", CLASSES[name] | {key: value})
    assert Config.from_json(tmp_path / "a.json") == Config.from_json(tmp_path / "b.json")


@pytest.mark.parametrize("change", HARMLESS)
def test_a_config_that_changes_no_logit_of_llada_8b_is_accepted(tmp_path, change):
    write_json(tmp_path / "config.json", LLADA | change)
    expected = Config(**{field: LLADA[field] for field in FIELDS})
    assert Config.from_json(tmp_path / "config.json") == expected


@pytest.mark.parametrize(
    "model_type", ["qwen2", "llama", "dream", "Fast_dLLM_Qwen", "", None, 5, ["Dream"], "absent"]
)
def test_only_layouts_known_to_be_implemented_load(tmp_path, model_type):
    """Any other once decoded with logits that are not shifted."""
    config = DREAM | {"model_type": model_type}
    if model_type == "absent":
        config, model_type = {k: v for k, v in DREAM.items() if k != "model_type"}, None
    message = refusal(write_checkpoint(tmp_path, config))
    said = f"model_type is {model_type!r}, but only ['llada', 'illada', 'a2d-qwen2', 'Dream'] are"
    assert message == f"{tmp_path / 'config.json'}: {said} implemented"


def test_an_unknown_layout_is_refused_however_it_is_made():
    with pytest.raises(ValueError, match="model_type is 'dream', but only"):
        Config(**{field: TINY[field] for field in FIELDS} | {"model_type": "dream"})


def test_a_base_of_the_rotary_embedding_that_stands_twice_stands_there_once(tmp_path):
    twice = CODER | {"rope_theta": 5e5}
    message = refusal(write_checkpoint(tmp_path, twice))
    said = "rope_theta is [500000.0, 1000000.0], should be one number"
    assert message == f"{tmp_path / 'config.json'}: {said}"


def test_a_message_is_not_longer_than_what_it_says(tmp_path):
    config = DREAM | {"layer_types": ["sliding_attention"] * 10**5}
    assert len(refusal(write_checkpoint(tmp_path, config))) < 300 + len(str(tmp_path))


def test_settings_of_a_model_are_frozen():
    config = Config(**{field: TINY[field] for field in FIELDS})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mask_token_id = 3


@pytest.mark.parametrize(
    "config, lost, missing",
    [
        (TINY, ["rope_theta"], ["rope_theta"]),
        (TINY, [field for field in FIELDS if field != "d_model"], NEEDED[1:]),
        (DREAM, ["eos_token_id"], ["eos_token_id"]),
        (DREAM, ["num_hidden_layers", "vocab_size"], ["num_hidden_layers", "vocab_size"]),
    ],
)
def test_all_missing_keys_are_named_at_once(tmp_path, config, lost, missing):
    config = {key: value for key, value in config.items() if key not in lost}
    message = refusal(write_checkpoint(tmp_path, config))
    assert message == f"{tmp_path / 'config.json'}: missing keys {missing}"


def test_a_config_silent_about_biases_and_tying_has_neither(tmp_path):
    config = {key: value for key, value in TINY.items() if key in NEEDED}
    loaded = Transformer.from_pretrained(write_checkpoint(tmp_path, config))
    assert loaded.config == Config(**{field: TINY[field] for field in FIELDS})


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("n_heads", "4", "n_heads is '4', should be int"),
        ("n_layers", True, "n_layers is True, should be int"),
        ("mlp_hidden_size", 6.0, "mlp_hidden_size is 6.0, should be int"),
        ("vocab_size", "11", "vocab_size is '11', should be int"),
        ("d_model", -8, "d_model is -8, should be from 1 to 2**63"),
        ("n_layers", 0, "n_layers is 0, should be from 1 to 2**63"),
        ("n_kv_heads", 0, "n_kv_heads is 0, should be from 1 to 2**63"),
        ("max_sequence_length", 2**63, f"max_sequence_length is {2**63}, should be from 1 to"),
        ("rope_theta", float("nan"), "rope_theta is [nan], should be one number"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan, should be from 0 to"),
        ("rope_theta", float("inf"), "rope_theta is inf, should be from 0 to"),
        ("rope_theta", -1.0, "rope_theta is -1.0, should be from 0 to"),
        ("include_qkv_bias", 0, "include_qkv_bias is 0, should be bool"),
        ("rms_norm_eps", None, "missing keys ['rms_norm_eps']"),
        ("d_model", 12, "d_model is 12, should be an even multiple of n_heads 4"),
        ("n_kv_heads", 3, "n_heads is 4, should be a multiple of n_kv_heads 3"),
        ("n_kv_heads", 8, "n_heads is 4, should be a multiple of n_kv_heads 8"),
        ("vocab_size", 13, "vocab_size is 13, should be at most embedding_size 12"),
        ("mask_token_id", 12, "mask_token_id is 12, should be from 0 to 11"),
        ("eos_token_id", 12, "eos_token_id is 12, should be from 0 to 11"),
        ("eos_token_id", -1, "eos_token_id is -1, should be ids"),
        ("eos_token_id", [0, "1"], "eos_token_id is [0, '1'], should be ids"),
        ("eos_token_id", True, "eos_token_id is True, should be ids"),
    ],
)
def test_a_number_that_makes_no_transformer_is_refused(tmp_path, key, value, complaint):
    message = refusal(write_checkpoint(tmp_path, TINY | {key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {complaint}")


@pytest.mark.parametrize("ids", [("1",), (12,), (-1,), (True,), (0, None)])
def test_an_end_of_a_config_that_is_no_id_is_refused(ids):
    with pytest.raises(ValueError, match="other_end_ids is .*, should be from 0 to 11"):
        Config(**{field: TINY[field] for field in FIELDS}, other_end_ids=ids)


def test_a_message_has_the_keys_of_the_file(tmp_path):
    message = refusal(write_checkpoint(tmp_path, DREAM | {"hidden_size": 12}))
    said = "hidden_size is 12, should be an even multiple of num_attention_heads 4"
    assert message == f"{tmp_path / 'config.json'}: {said}"


@pytest.mark.parametrize("beside", ["nothing", "a tokenizer"])
@pytest.mark.parametrize("config", [TINY, DREAM], ids=["LLaDA", "HF"])
def test_a_size_of_the_vocabulary_that_is_no_integer_is_refused(tmp_path, config, beside):
    if beside == "a tokenizer":
        write_words(tmp_path, "abc")
    message = refusal(write_checkpoint(tmp_path, config | {"vocab_size": "11"}))
    assert message == f"{tmp_path / 'config.json'}: vocab_size is '11', should be int"


# Tensors and arguments


def test_every_kind_of_tensor_that_does_not_fit_is_told(tmp_path):
    tensors = make_tensors()
    del tensors[PREFIX + "ln_f.weight"], tensors[PREFIX + "blocks.1.up_proj.weight"]
    tensors["wte.weight"] = torch.zeros(12, 8)  # once taken for the one with the prefix
    tensors[PREFIX + "blocks.2.q_proj.weight"] = torch.zeros(8, 8)
    tensors[PREFIX + "wte.weight"] = torch.zeros(13, 8)
    tensors[PREFIX + "blocks.0.attn_norm.weight"] = torch.zeros(8, 1)
    message = refusal(write_checkpoint(tmp_path, tensors=tensors))
    assert message.splitlines() == [
        f"{tmp_path}: the tensors do not fit config.json",
        f"2 missing: {PREFIX}blocks.1.up_proj.weight, {PREFIX}ln_f.weight",
        f"2 unexpected: {PREFIX}blocks.2.q_proj.weight, wte.weight",
        f"2 of another shape: {PREFIX}blocks.0.attn_norm.weight [8, 1] should be [8], "
        f"{PREFIX}wte.weight [13, 8] should be [12, 8]",
    ]


def test_of_many_tensors_that_do_not_fit_the_first_are_named(tmp_path):
    """A mixture of experts once ended in one line of 193,599 characters."""
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": torch.zeros(6, 8)
        for layer in range(3)
        for expert in range(300)
    }
    message = refusal(write_layout(tmp_path, "Dream", change=experts)[0])
    assert "\n900 unexpected: model.layers." in message and message.endswith(" and 897 more")
    assert len(message) < 1000


@pytest.mark.parametrize("many, told", [(3, "a1, a2, a3"), (4, "a1, a2, a3 and 1 more")])
def test_three_tensors_are_named_and_the_others_counted(tmp_path, many, told):
    extra = {f"a{n}": torch.zeros(1) for n in range(1, many + 1)}
    message = refusal(write_checkpoint(tmp_path, tensors=make_tensors() | extra))
    assert message.splitlines()[1:] == [f"{many} unexpected: {told}"]


@pytest.mark.parametrize("size", [2**40, 2**62])
@pytest.mark.parametrize("key", ["n_layers", "d_model", "mlp_hidden_size", "embedding_size"])
def test_a_size_beyond_the_files_is_refused_before_a_model_is_built(tmp_path, key, size):
    """As many layers once were built until the memory was full."""
    message = refusal(write_checkpoint(tmp_path, TINY | {key: size}))
    said = f"{key} is {size}, but the files hold only 904 numbers"
    assert message == f"{tmp_path / 'config.json'}: {said}"


@pytest.mark.parametrize(
    "key, most", [("n_layers", 14), ("mlp_hidden_size", 113), ("embedding_size", 113)]
)
def test_a_size_is_beyond_the_files_if_one_kind_of_matrix_is(tmp_path, key, most):
    message = refusal(write_checkpoint(tmp_path, TINY | {key: most}))
    assert message.startswith(f"{tmp_path}: the tensors do not fit config.json")
    message = refusal(write_checkpoint(tmp_path, TINY | {key: most + 1}))
    assert message.endswith(f"{key} is {most + 1}, but the files hold only 904 numbers")


def test_no_weight_is_read_for_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "read_tensors", None)
    folder, _, _ = write_layout(tmp_path, "Dream", change={"model.norm.weight": torch.zeros(9)})
    assert "model.norm.weight [9] should be [8]" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(DREAM | {"num_hidden_layers": 2**40}))
    assert "num_hidden_layers is 1099511627776, but the files hold" in refusal(folder)


@pytest.mark.parametrize("stored, word", [(torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3")])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_tensor_that_is_no_float_of_16_bits_or_more_is_refused(tmp_path, stored, word, dtype):
    tensors, name = make_tensors(), PREFIX + "blocks.1.ff_proj.weight"
    tensors[name] = tensors[name].to(stored)
    message = refusal(write_checkpoint(tmp_path, tensors=tensors), dtype=dtype)
    said = f"{name!r} is {word}, should be one of ['F64', 'F32', 'BF16', 'F16']"
    assert message == f"{tmp_path / 'model.safetensors'}: {said}"


def test_mixed_dtypes_are_refused_unless_one_is_asked_for(tmp_path):
    tensors, name = make_tensors(dtype=torch.bfloat16), PREFIX + "wte.weight"
    tensors[name] = tensors[name].float()
    message = refusal(write_checkpoint(tmp_path, tensors=tensors, n_shards=2))
    assert message.startswith(f"{tmp_path}: mixes [torch.bfloat16, torch.float32], choose the")
    assert "--dtype" in message
    loaded = Transformer.from_pretrained(tmp_path, dtype=torch.float64)
    assert holds(loaded, {name: tensor.double() for name, tensor in tensors.items()})


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    write_json(write_checkpoint(tmp_path) / "adapter_config.json", {"peft_type": "LORA"})
    assert refusal(tmp_path).startswith(f"{tmp_path / 'adapter_config.json'}: adapters are not")


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_every_spelling_of_a_device_is_understood(tmp_path, device):
    """cpu:0 once made a file corrupt."""
    assert holds(Transformer.from_pretrained(write_checkpoint(tmp_path), device), make_tensors())


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"dtype": "float32"}, "dtype is float32"),
        ({"device": "foo"}, "device is 'foo'"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"revision": "main"}, "revision is 'main'"),
    ],
)
def test_an_argument_out_of_the_question_is_named(tmp_path, arguments, complaint):
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
def test_only_the_logits_of_dream_are_shifted(kind):
    config = Config(**{field: TINY[field] for field in FIELDS} | {"model_type": kind})
    assert config.shifted == (kind == "Dream")


@pytest.mark.parametrize("layout", ["illada", "a2d-qwen2"])
def test_a_head_equal_to_the_embedding_it_is_tied_to_may_stand_in_the_file(tmp_path, layout):
    _, _, tensors = write_layout(tmp_path, layout)
    head = {"lm_head.weight": tensors[PREFIX + "wte.weight"]}
    folder, _, _ = write_layout(tmp_path, layout, change=head)
    assert holds(Transformer.from_pretrained(folder), tensors)


@pytest.mark.parametrize("layout", ["illada", "a2d-qwen2"])
def test_a_head_unlike_the_embedding_it_is_tied_to_is_refused(tmp_path, layout):
    """One of the two is meant, and nobody knows which."""
    change = {"lm_head.weight": torch.zeros(12, 8)}
    message = refusal(write_layout(tmp_path, layout, change=change)[0])
    assert message.startswith(f"{tmp_path}: ") and message.endswith("unlike it, lm_head.weight")


def test_tensors_that_do_not_fit_are_named_as_in_the_file_and_missing_ones_as_in_llada(tmp_path):
    change = {"lm_head.weight": None, "model.norm.weight": torch.zeros(9)}
    change["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(8)
    message = refusal(write_layout(tmp_path, "Dream", change=change)[0])
    assert message.splitlines()[1:] == [
        f"1 missing: {PREFIX}ff_out.weight",
        "1 unexpected: model.layers.0.self_attn.o_proj.bias",
        "1 of another shape: model.norm.weight [9] should be [8]",
    ]


def test_a_tensor_under_both_of_its_names_is_refused(tmp_path):
    folder, _, _ = write_layout(tmp_path, "Dream", change={PREFIX + "ln_f.weight": torch.zeros(8)})
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: ") and "already" in message


@pytest.mark.parametrize("layer", [0, 1])
def test_biases_are_in_all_layers_or_in_none(tmp_path, layer):
    lost = [f"model.layers.{layer}.self_attn.{name}_proj.bias" for name in "qkv"]
    message = refusal(write_layout(tmp_path, "Dream", change=dict.fromkeys(lost))[0])
    missing = [f"{PREFIX}blocks.{layer}.{name}_proj.bias" for name in "qkv"]
    assert message.splitlines()[1:] == [f"3 missing: {', '.join(missing)}"]


def test_a_llama_without_biases_has_none_in_its_files(tmp_path):
    change = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}
    message = refusal(write_layout(tmp_path, "illada", change=change)[0])
    assert message.splitlines()[1:] == ["1 unexpected: model.layers.0.self_attn.q_proj.bias"]


def test_biases_that_the_config_promises_are_missed(tmp_path):
    message = refusal(write_checkpoint(tmp_path, TINY | {"include_qkv_bias": True}, make_tensors()))
    assert f"6 missing: {PREFIX}blocks.0.q_proj.bias, " in message


YARN = {"rope_theta": 1000000.0, "rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "values, change",
    [
        (DREAM, {"rope_scaling": YARN}),
        (DREAM, {"rope_scaling": "yarn"}),
        (DREAM, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        (CODER, {"rope_parameters": YARN}),
        (CODER, {"rope_parameters": {"rope_theta": 1e6, "type": "yarn"}}),
        (CODER, {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}),
        (CODER, {"sliding_window": 32768, "use_sliding_window": True}),
        (CODER, {"layer_types": "full_attention"}),
        (CODER, {"attention_bias": False}),
        (ILLADA, {"attention_bias": True}),
    ],
)
def test_what_is_not_implemented_is_refused_under_all_of_its_names(tmp_path, values, change):
    message = refusal(write_checkpoint(tmp_path, values | change))
    key, value = list(change.items())[0]
    assert message.startswith(f"{tmp_path / 'config.json'}: {key} is {value!r}, but only")


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


@pytest.mark.parametrize("layout", ["llada", *LAYOUTS])
def test_a_mask_of_which_all_files_are_silent_is_the_layouts_own(tmp_path, layout):
    """iLLaDA's say nowhere that <[MASK]> is it."""
    config = TINY if layout == "llada" else LAYOUTS[layout][0]
    config = {key: value for key, value in config.items() if key != "mask_token_id"}
    write_json(tmp_path / "config.json", config)
    masks = ["<|mdm_mask|>", "<[MASK]>", "<|mask|>"]
    write_words(tmp_path, ["a", "b", "c", *masks, "g", "h", "i", "j"])
    own = {"llada": 3, "illada": 4, "Dream": 5, "a2d-qwen2": 5}
    assert Config.from_json(tmp_path / "config.json").mask_token_id == own[layout]


@pytest.mark.parametrize(
    "own, generation, eos, others",
    [
        (0, None, 0, ()),
        ([3, 0, 5], None, 3, (0, 5)),
        (0, 0, 0, ()),
        (0, 4, 0, (4,)),
        (0, [4, 0, 7], 0, (4, 7)),
        ([0, 4], [7, 4], 0, (4, 7)),
        (None, [7, 4], 7, (4,)),
        (0, 11, 0, (11,)),
        (0, 12, 0, ()),
        (0, 10**6, 0, ()),
    ],
)
def test_every_end_of_sequence_that_the_files_name_ends_an_answer(
    tmp_path, own, generation, eos, others
):
    write_json(tmp_path / "config.json", TINY | {"eos_token_id": own})
    if generation is not None:
        write_json(tmp_path / "generation_config.json", {"eos_token_id": generation})
    config = Config.from_json(tmp_path / "config.json")
    assert (config.eos_token_id, config.other_end_ids) == (eos, others)
    assert config.end_ids == (eos, *others)


def test_an_end_that_is_no_id_is_refused_by_the_name_of_its_file(tmp_path):
    write_json(write_checkpoint(tmp_path) / "generation_config.json", {"eos_token_id": [0, "x"]})
    message = refusal(tmp_path)
    said = "eos_token_id is [0, 'x'], should be ids"
    assert message == f"{tmp_path / 'generation_config.json'}: {said}"


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|im_end|>"])
def test_the_tokenizers_end_of_turn_ends_an_answer(tmp_path, token):
    write_json(tmp_path / "config.json", TINY | {"eos_token_id": [0, 3]})
    write_words(tmp_path, ["a", "b", token, "d"])
    assert Config.from_json(tmp_path / "config.json").end_ids == (0, 3, 2)


def test_an_end_of_turn_is_no_end_of_sequence(tmp_path):
    write_json(tmp_path / "config.json", TINY | {"eos_token_id": None})
    write_words(tmp_path, ["a", "<|eot_id|>"])
    assert refusal(tmp_path).endswith("missing keys ['eos_token_id']")


def test_an_end_of_turn_that_no_logit_stands_for_is_none(tmp_path):
    write_json(write_qwen2(tmp_path) / "config.json", TINY)
    assert Config.from_json(tmp_path / "config.json").end_ids == (0,)


def test_reading_a_config_builds_no_tokenizer(tmp_path, monkeypatch):
    write_json(write_llada_tokenizer(tmp_path) / "config.json", TINY)
    monkeypatch.setattr(model_file, "Tokenizer", None)
    assert Config.from_json(tmp_path / "config.json").vocab_size == 11


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram", "Qwen2"])
def test_the_files_are_counted_like_the_tokenizer(tmp_path, kind):
    if kind == "Qwen2":
        write_qwen2(tmp_path)
    else:
        pairs = [("a", 0.0), ("b", -1.0), ("ab", -2.0)]
        words = models.WordLevel({"a": 0, "b": 5}, "a")
        tokenizer = Tokenizer(words if kind == "WordLevel" else models.Unigram(pairs, 0))
        tokenizer.add_special_tokens(["<x>"])
        tokenizer.add_tokens(["<y>", "a"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert model_file.token_ids(tmp_path) == load_tokenizer(tmp_path).get_vocab()


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


@pytest.mark.parametrize("index", [{}, {"weight_map": ["wte"]}, {"weight_map": {}}])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    write_json(write_checkpoint(tmp_path, n_shards=2) / INDEX, index)
    assert refusal(tmp_path) == f"{tmp_path / INDEX}: has no weight_map"


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path):
    index = write_checkpoint(tmp_path, n_shards=2) / INDEX
    shard = "model-00002-of-00002.safetensors"
    write_json(index, {"weight_map": dict.fromkeys(make_tensors(), shard)})
    with safe_open(tmp_path / shard, framework="pt") as stored:
        names = Transformer(Config.from_json(tmp_path / "config.json")).state_dict()
        lost = [PREFIX + name for name in names if PREFIX + name not in stored.keys()]
    assert len(lost) > 3
    assert refusal(tmp_path).splitlines()[1:] == [
        f"{len(lost)} missing: {', '.join(lost[:3])} and {len(lost) - 3} more"
    ]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123456789\n"


@pytest.mark.parametrize(
    "file", ["config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.json"]
)
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, file):
    (write_checkpoint(tmp_path, n_shards=2) / file).write_bytes(LFS)
    load = load_tokenizer if file == "tokenizer.json" else Transformer.from_pretrained
    said = "a pointer of git-LFS, `git lfs pull` gets the file itself"
    assert refusal(tmp_path, load) == f"{tmp_path / file}: {said}"


@pytest.mark.parametrize("shard", ["../x", "/x", "a/b", "", ".", "..", None, ["x"]])
def test_no_file_outside_the_folder_is_opened(tmp_path, monkeypatch, shard):
    index = write_checkpoint(tmp_path, n_shards=1) / INDEX
    write_json(index, {"weight_map": dict.fromkeys(make_tensors(), shard)})
    monkeypatch.setattr(model_file, "safe_open", None)
    assert refusal(tmp_path).startswith(f"{index}: shard {shard!r} should be")


# The hub


def test_only_what_is_read_is_downloaded(tmp_path, monkeypatch):
    download = Mock(return_value=str(write_checkpoint(tmp_path)))
    monkeypatch.setattr(model_file, "snapshot_download", download)
    assert holds(Transformer.from_pretrained("GSAI-ML/LLaDA-8B-Instruct"), make_tensors())
    data = ["config.json", "model-00001-of-00006.safetensors", INDEX, "vocab.json", "merges.txt"]
    data += ["chat_template.jinja"]
    other = ["modeling_llada.py", "pytorch_model.bin", "README.md", "a.pkl", "json.exe", "a.txt"]
    assert download.call_args.args == ("GSAI-ML/LLaDA-8B-Instruct",)
    settings = download.call_args.kwargs
    assert settings.pop("revision") is None
    assert list(filter_repo_objects(data + other, **settings)) == data


@pytest.mark.parametrize("load", [Transformer.from_pretrained, load_tokenizer])
def test_a_revision_is_the_one_downloaded(tmp_path, monkeypatch, load):
    folder = write_llada_tokenizer(write_checkpoint(tmp_path))
    download = Mock(return_value=str(folder))
    monkeypatch.setattr(model_file, "snapshot_download", download)
    load("some/model", revision="v2")
    assert download.call_args.kwargs["revision"] == "v2"


@pytest.mark.parametrize("load", [Transformer.from_pretrained, load_tokenizer])
@pytest.mark.parametrize("path", ["nobody/no-such-model", "no/such/folder", "a\0b", ""])
def test_what_is_neither_folder_nor_repository_is_named(tmp_path, monkeypatch, load, path):
    """The empty path once was the current folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(write_checkpoint(tmp_path))
    assert refusal(path, load).startswith(f"{path!r} is no local folder")


GATED = """401 Client Error. (Request ID: Root=1-68)

Cannot access gated repo for url https://huggingface.co/api/models/some/model/revision/main.
Access to model some/model is restricted. You must have access to it and be authenticated."""
MISSING = """404 Client Error. (Request ID: Root=1-68)

Repository Not Found for url: https://huggingface.co/api/models/some/model/revision/main.
Please make sure you specified the correct `repo_id` and `repo_type`."""


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
@pytest.mark.parametrize(
    "said, reason",
    [
        ("the reason", "the reason"),
        (GATED, "Access to model some/model is restricted."),
        (MISSING, "Repository Not Found for url: "),
    ],
)
def test_a_download_that_fails_names_repository_and_reason(monkeypatch, kind, said, reason):
    """The first line is only a number of HTTP."""
    download = Mock(side_effect=kind(said + 100 * "\nand a page of advice"))
    monkeypatch.setattr(model_file, "snapshot_download", download)
    message = refusal("some/model")
    assert message.startswith("'some/model' is no local folder") and reason in message
    assert len(message) < 600 and len(message.splitlines()) == 1

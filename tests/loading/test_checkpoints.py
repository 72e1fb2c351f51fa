"""Checkpoints written here, good and bad, against what the loader makes of them: the same numbers
bit for bit, or one ValueError that names the culprit and its value."""

import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import ADDED, CODER, DREAM, FIELDS, INDEX, LAYOUTS, LLADA, NEEDED, PREFIX, TINY
from checkpoints import make_tensors, refusal, write_checkpoint, write_json, write_layout
from checkpoints import write_llada_tokenizer, write_qwen2, write_words
from hypothesis import example, given
from hypothesis import strategies as st
from huggingface_hub.utils import filter_repo_objects
from model import DTYPES, Config, Transformer, load_tokenizer, read_config

import model as model_file
from strategies import model_specs

ROOT = Path(model_file.__file__).parent


def holds(model, tensors):
    """Whether the model's parameters are these tensors of a checkpoint, bit for bit."""
    found = {PREFIX + name: parameter for name, parameter in model.named_parameters()}
    return found.keys() == tensors.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in tensors.items()
    )


def read(folder, values):
    """The Config of a config.json with these values, or its refusal."""
    write_json(folder / "config.json", values)
    return read_config(folder / "config.json")


# Good checkpoints


@given(model_specs(list(DTYPES.values())), st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_every_shape_survives_the_round_trip(spec, spare_rows, bias, n_shards):
    config = replace(spec.config(), embedding_size=spec.vocab_size + spare_rows)
    config = replace(config, include_qkv_bias=bias)
    tensors = make_tensors(asdict(config), spec.dtype, spec.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), LLADA | asdict(config), tensors, n_shards or None)
        loaded = Transformer.from_pretrained(folder)
    assert loaded.config == config and holds(loaded, tensors)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("n_shards", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_layout_is_the_same_model_as_in_lladas_own(tmp_path, layout, n_shards):
    """That one with a head of its own, so that a tied head is seen to be the embedding."""
    folder, config, tensors = write_layout(tmp_path / "other", layout, n_shards=n_shards)
    loaded = Transformer.from_pretrained(folder)
    assert loaded.config == config and holds(loaded, tensors)
    assert config.shifted == (layout == "Dream")
    head = {PREFIX + "ff_out.weight": tensors[PREFIX + "wte.weight"]} if config.weight_tying else {}
    own = LLADA | asdict(replace(config, weight_tying=False))
    own = Transformer.from_pretrained(write_checkpoint(tmp_path / "own", own, tensors | head))
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens), own(tokens))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_or_its_name_converts_every_tensor(tmp_path, stored, name):
    """Names were refused by the loader, so no run with --dtype ever began."""
    tensors = make_tensors(dtype=DTYPES[stored])
    folder = write_checkpoint(tmp_path, tensors=tensors)
    converted = {key: tensor.to(getattr(torch, name)) for key, tensor in tensors.items()}
    assert holds(Transformer.from_pretrained(folder, dtype=name), converted)
    assert holds(Transformer.from_pretrained(folder, dtype=getattr(torch, name)), converted)


@pytest.mark.parametrize("n_shards", [None, 2])
def test_links_as_in_the_cache_of_the_hub_are_followed(tmp_path, n_shards):
    snapshot = write_checkpoint(tmp_path / "snapshot", n_shards=n_shards)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(tmp_path / "blobs" / f"abc{number}")
        file.symlink_to(f"../blobs/abc{number}")
    (tmp_path / "link").symlink_to("snapshot")
    assert holds(Transformer.from_pretrained(tmp_path / "link"), make_tensors())


def test_loading_draws_no_random_numbers(tmp_path):
    before = torch.get_rng_state()
    Transformer.from_pretrained(write_checkpoint(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stored", ["head", "embedding", "both"])
@pytest.mark.parametrize("layout", ["illada", "a2d-qwen2"])
def test_of_a_head_that_is_the_embedding_either_name_will_do(tmp_path, layout, stored):
    """safetensors' save_model keeps the name that comes first in the alphabet: the head's."""
    _, config, tensors = write_layout(tmp_path, layout)
    embedding = tensors[PREFIX + "wte.weight"]
    change = {
        "lm_head.weight": None if stored == "embedding" else embedding,
        "model.embed_tokens.weight": None if stored == "head" else embedding,
    }
    folder, _, _ = write_layout(tmp_path, layout, change=change)
    loaded = Transformer.from_pretrained(folder)
    assert loaded.config == config and holds(loaded, tensors)


def test_a_head_unlike_the_embedding_it_is_tied_to_is_refused(tmp_path):
    """One of the two is meant, and nobody knows which."""
    change = {"lm_head.weight": torch.zeros(12, 8)}
    message = refusal(write_layout(tmp_path, "illada", change=change)[0])
    assert message.startswith(f"{tmp_path}: config.json says that the head is the embedding")


@pytest.mark.parametrize(
    "name, table",
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(1)),
        ("model.rotary_emb.original_inv_freq", torch.ones(1)),
        ("model.rotary_emb.cos_cached", torch.ones(9, 2, dtype=torch.float16)),
        ("model.transformer.blocks.1.rotary_emb.sin_cached", torch.ones(9, 2)),
        ("model.embeddings.position_ids", torch.arange(9)),
    ],
)
def test_a_table_that_follows_from_the_config_is_ignored(tmp_path, name, table):
    folder, _, tensors = write_layout(tmp_path, "Dream", change={name: table})
    assert holds(Transformer.from_pretrained(folder), tensors)


# config.json, key by key. What is neither a field of Config (the tests above) nor here is refused:
# it may ask for another computation, as these keys of released models do ...

REFUSED = {
    "LLaDA": {
        "activation_type": "gelu", "alibi": True, "attention_layer_norm": True,
        "bias_for_layer_norm": True, "block_group_size": 2, "block_type": "sequential",
        "clip_qkv": 8.0, "include_bias": True, "input_emb_norm": True,
        "layer_norm_type": "low_precision", "layer_norm_with_affine": False,
        "multi_query_attention": True, "rope": False, "rope_full_precision": False,
        "scale_logits": True, "attention_bias": True, "hidden_act": "gelu",
    },
    "HF": {
        "attention_bias": False, "head_dim": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_bias": True, "sliding_window": 4096, "use_mrope": True, "d_model": 8,
        "embedding_size": 12, "include_qkv_bias": True,
    },
    "both": {
        "attention_multiplier": 0.1, "attention_sink": 4, "attn_logit_softcapping": 50.0,
        "attn_temperature_tuning": True, "block_size": 32, "clip_qkv": 8.0,
        "compression_config": {"format": "int"}, "dim_model_base": 256, "factor": 2.0,
        "embedding_multiplier": 12.0, "final_logit_softcapping": 30.0, "first_k_dense_replace": 1,
        "hidden_activation": "gelu_pytorch_tanh", "is_causal": True, "is_decoder": True,
        "logit_scale": 0.06, "logits_scaling": 8.0, "mscale": 0.7, "n_routed_experts": 64,
        "no_rope_layers": [1, 1, 0], "norm_topk_prob": True, "num_experts": 8,
        "num_experts_per_tok": 2, "num_local_experts": 8, "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.5, "qk_layernorm": True, "qk_norm": True,
        "quantization": {"bits": 8}, "quantization_config": {"bits": 4},
        "query_pre_attn_scalar": 256, "residual_multiplier": 0.2, "rope_interleaved": True,
        "rope_local_base_freq": 1e4, "rope_type": "yarn", "rotary_dim": 4, "rotary_pct": 0.25,
        "scale_depth": 1.4, "scale_emb": 12, "type": "linear", "unheard_of": {"a": [1, 2]},
        "use_parallel_residual": True, "use_qk_norm": True, "use_sliding_window": True,
    },
}  # fmt: skip
# ... or without influence on a logit.
FREE = {
    "LLaDA": {
        "alibi_bias_max": 1.0, "attention_dropout": 0.5, "attention_layer_norm_with_affine": False,
        "embedding_dropout": 0.5, "flash_attention": True, "init_cutoff_factor": 3.0,
        "init_device": "cuda", "init_fn": "normal", "init_std": 1.0, "mlp_ratio": 9,
        "precision": "fp32", "residual_dropout": 0.5, "attention_bias": False,
    },
    "HF": {
        "attention_bias": True, "attention_dropout": 0.5, "head_dim": 2, "initializer_range": 1.0,
        "layer_norm_eps": None, "layer_types": ["full_attention"] * 3, "max_window_layers": 1,
        "mlp_bias": False, "pretraining_tp": 2, "resid_pdrop": 0.5,
        "sliding_window": 4096, "use_mrope": False,
    },
    "both": {
        "_name_or_path": "x/y", "_attn_implementation_autoset": True, "architectures": ["X"],
        "auto_map": {"AutoModel": "x.X"}, "bos_token_id": 1, "dtype": "float16",
        "is_causal": False, "num_experts": 0, "pad_token_id": None, "quantization_config": {},
        "rope_scaling": None, "sliding_window": None, "tokenizer_class": "X",
        "torch_dtype": "float16", "transformers_version": "0", "use_cache": None,
    },
}  # fmt: skip
# What an object for the rotary embedding may say, beside rope_theta.
PLAIN_ROPE = [
    {},
    {"rope_type": "default"},
    {"type": "default", "factor": 1.0, "rope_theta": 1e6},
    {"rope_type": "default", "partial_rotary_factor": 1.0, "factor": None},
]
SCALED_ROPE = [
    ({"rope_type": "linear", "factor": 2.0}, "rope_type is 'linear', but only 'default'"),
    ({"type": "yarn"}, "type is 'yarn', but only 'default'"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but"),
    ({"mrope_section": [1, 1]}, "mrope_section is [1, 1], and nothing here"),
    ({"full_attention": {"rope_type": "default"}}, "full_attention is {'rope_type': 'default'}"),
    ({"rope_theta": 5e5}, "rope_theta is 1000000.0, but 500000.0 in"),
    ("yarn", "rope_scaling is 'yarn', should be an object"),
]
CLASSES = {"LLaDA": TINY, "HF": DREAM}


def of_class(table):
    """[(name of a class, key, value)] of one of the tables above."""
    return [
        pytest.param(name, key, value, id=f"{name}-{key}")
        for name in CLASSES
        for key, value in (table[name] | table.get("both", {})).items()
    ]


def test_the_config_of_llada_8b_is_read_as_it_was_released(tmp_path):
    assert read(tmp_path, LLADA) == Config(**{field: LLADA[field] for field in FIELDS})


@pytest.mark.parametrize("name, key, value", of_class(REFUSED))
def test_a_key_that_asks_for_another_computation_is_refused_by_its_name(tmp_path, name, key, value):
    """Nineteen of these once changed nothing, in silence."""
    config = {k: v for k, v in CLASSES[name].items() if k != "use_sliding_window"}
    message = refusal(write_checkpoint(tmp_path, config | {key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {key} is {value!r}, ")


@pytest.mark.parametrize("name, key, value", of_class(FREE))
def test_a_key_without_influence_changes_no_config(tmp_path, name, key, value):
    assert read(tmp_path, CLASSES[name]) == read(tmp_path, CLASSES[name] | {key: value})


@pytest.mark.parametrize("group", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("said", PLAIN_ROPE)
def test_a_rotary_embedding_that_is_the_default_may_say_so(tmp_path, group, said):
    assert read(tmp_path, DREAM) == read(tmp_path, DREAM | {group: said})


@pytest.mark.parametrize("said, complaint", SCALED_ROPE)
def test_a_rotary_embedding_of_another_kind_is_refused(tmp_path, said, complaint):
    message = refusal(write_checkpoint(tmp_path, DREAM | {"rope_scaling": said}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {complaint}")


@pytest.mark.parametrize(
    "model_type", ["qwen2", "llama", "dream", "Fast_dLLM_Qwen", "", None, 5, ["Dream"]]
)
def test_only_layouts_known_to_be_implemented_load(tmp_path, model_type):
    """Any other once decoded with logits that are not shifted."""
    message = refusal(write_checkpoint(tmp_path, DREAM | {"model_type": model_type}))
    assert message.startswith(f"{tmp_path / 'config.json'}: model_type is {model_type!r}, but only")
    values = {field: TINY[field] for field in FIELDS} | {"model_type": model_type}
    with pytest.raises(ValueError, match="model_type is "):
        Config(**values)


@pytest.mark.parametrize(
    "config, lost, missing",
    [
        (TINY, ["rope_theta"], ["rope_theta"]),
        (TINY, [field for field in FIELDS if field != "d_model"], NEEDED[1:]),
        (DREAM, ["num_hidden_layers", "vocab_size"], ["num_hidden_layers", "vocab_size"]),
    ],
)
def test_all_missing_keys_are_named_at_once(tmp_path, config, lost, missing):
    config = {key: value for key, value in config.items() if key not in lost}
    message = refusal(write_checkpoint(tmp_path, config))
    assert message == f"{tmp_path / 'config.json'}: missing keys {missing}"


def test_a_config_silent_about_biases_and_tying_has_neither(tmp_path):
    config = {key: value for key, value in TINY.items() if key in NEEDED}
    assert read(tmp_path, config) == Config(**{field: TINY[field] for field in FIELDS})


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("n_heads", "4", "n_heads is '4', should be int"),
        ("n_layers", True, "n_layers is True, should be int"),
        ("d_model", 8.0, "d_model is 8.0, should be int"),
        ("mlp_hidden_size", 6.0, "mlp_hidden_size is 6.0, should be int"),
        ("vocab_size", "11", "vocab_size is '11', should be int"),
        ("embedding_size", 12.0, "embedding_size is 12.0, should be int"),
        ("mask_token_id", 3.0, "mask_token_id is 3.0, should be int"),
        ("d_model", -8, "d_model is -8, should be from 1 to 2**63"),
        ("n_kv_heads", 0, "n_kv_heads is 0, should be from 1 to 2**63"),
        ("max_sequence_length", 2**63, f"max_sequence_length is {2**63}, should be from 1 to"),
        ("rope_theta", float("nan"), "rope_theta is nan, should be from 0 to"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps is inf, should be from 0 to"),
        ("include_qkv_bias", 0, "include_qkv_bias is 0, should be bool"),
        ("d_model", 12, "d_model is 12, should be an even multiple of n_heads 4"),
        ("n_kv_heads", 3, "n_heads is 4, should be a multiple of n_kv_heads 3"),
        ("vocab_size", 13, "vocab_size is 13, should be at most embedding_size 12"),
        ("mask_token_id", 12, "mask_token_id is 12, should be from 0 to 11"),
        ("eos_token_id", 12, "eos_token_id is 12, should be from 0 to 11"),
        ("eos_token_id", -1, "eos_token_id is -1, should be ids"),
        ("eos_token_id", [0, "1"], "eos_token_id is [0, '1'], should be ids"),
        ("eos_token_id", 1.0, "eos_token_id is 1.0, should be ids"),
        ("eos_token_id", [], "eos_token_id is [], should be int"),
    ],
)
def test_a_number_that_makes_no_transformer_is_refused(tmp_path, key, value, complaint):
    write_words(tmp_path, "abc")  # that counts the vocabulary must not hide what is wrong with it
    message = refusal(write_checkpoint(tmp_path, TINY | {key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {complaint}")


def test_a_message_has_the_keys_of_the_file(tmp_path):
    message = refusal(write_checkpoint(tmp_path, DREAM | {"hidden_size": 12}))
    complaint = "hidden_size is 12, should be an even multiple of num_attention_heads 4"
    assert message == f"{tmp_path / 'config.json'}: {complaint}"


# What the tokenizer and generation_config.json say of the ids


@pytest.mark.parametrize("config", [TINY | {"vocab_size": 12}, DREAM], ids=["LLaDA", "Dream"])
@pytest.mark.parametrize("words, vocab_size", [(0, 12), (10, 10), (12, 12), (13, 12)])
def test_only_ids_that_have_a_token_are_in_the_vocabulary(tmp_path, config, words, vocab_size):
    if words:  # of which the first two are one: an id in between has no token
        write_words(tmp_path, "aacdefghijklm"[:words])
    config = read(tmp_path, config)
    assert (config.vocab_size, config.embedding_size) == (vocab_size, 12)


def test_added_tokens_are_in_the_vocabulary(tmp_path):
    config = read(write_qwen2(tmp_path), DREAM | {"vocab_size": 300})
    assert (config.vocab_size, config.embedding_size) == (1 + ADDED["<|im_end|>"], 300)


@pytest.mark.parametrize("token", ["c", {"content": "c", "lstrip": False, "special": True}])
@pytest.mark.parametrize("own, meant", [("absent", 2), (None, 2), (0, 0)])
def test_the_mask_is_that_of_the_tokenizer_unless_config_has_one(tmp_path, own, meant, token):
    given = {} if own == "absent" else {"mask_token_id": own}
    write_json(tmp_path / "tokenizer_config.json", {"mask_token": token, "pad_token": "b"})
    write_words(tmp_path, "abcdefgh")
    assert read(tmp_path, CODER | given).mask_token_id == meant


@pytest.mark.parametrize("token", [None, "x", {}, {"content": 5}, 5, ["a"]])
def test_a_mask_that_is_no_token_is_a_mask_that_is_missing(tmp_path, token):
    """No mask once was the token of the word None, which Qwen2's vocabulary has."""
    write_json(write_checkpoint(tmp_path, CODER) / "tokenizer_config.json", {"mask_token": token})
    write_words(tmp_path, ["a", "None", "{}", "5"])
    assert refusal(tmp_path).endswith("missing keys ['mask_token_id']")


@pytest.mark.parametrize("layout", ["llada", *LAYOUTS])
def test_a_mask_of_which_all_files_are_silent_is_the_layouts_own(tmp_path, layout):
    """iLLaDA's say nowhere that <[MASK]> is it."""
    config = TINY if layout == "llada" else LAYOUTS[layout][0]
    config = {key: value for key, value in config.items() if key != "mask_token_id"}
    masks = ["<|mdm_mask|>", "<[MASK]>", "<|mask|>"]
    write_words(tmp_path, ["a", "b", "c", *masks, "g", "h", "i", "j"])
    own = {"llada": 3, "illada": 4, "Dream": 5, "a2d-qwen2": 5}
    assert read(tmp_path, config).mask_token_id == own[layout]


@pytest.mark.parametrize(
    "own, generation, ends",
    [
        (0, None, (0,)),
        ([3, 0, 5], None, (3, 0, 5)),
        (0, 0, (0,)),
        (0, [4, 0, 7], (0, 4, 7)),
        ([0, 4], [7, 4], (0, 4, 7)),
        (None, [7, 4], (7, 4)),
        (0, 11, (0, 11)),
        (0, 12, (0,)),
    ],
)
@pytest.mark.parametrize("token, turn", [("<|eot_id|>", (2,)), ("<|im_end|>", (2,)), ("c", ())])
def test_every_end_that_the_files_name_ends_an_answer(tmp_path, own, generation, ends, token, turn):
    """The last is the end of a turn, which only the tokenizer knows."""
    write_json(tmp_path / "generation_config.json", {"eos_token_id": generation})
    write_words(tmp_path, ["a", "b", token, "d"])
    config = read(tmp_path, TINY | {"eos_token_id": own})
    assert config.end_ids == (*ends, *turn)
    assert (config.eos_token_id, *config.other_end_ids) == config.end_ids


def test_an_end_that_is_no_id_is_refused_by_the_name_of_its_file(tmp_path):
    write_json(write_checkpoint(tmp_path) / "generation_config.json", {"eos_token_id": [0, "x"]})
    complaint = "eos_token_id is [0, 'x'], should be ids"
    assert refusal(tmp_path) == f"{tmp_path / 'generation_config.json'}: {complaint}"
    for ids in ("1",), (12,), (-1,), (True,):
        with pytest.raises(ValueError, match="other_end_ids is .*, should be from 0 to 11"):
            Config(**{field: TINY[field] for field in FIELDS}, other_end_ids=ids)


def test_an_end_of_turn_is_no_end_of_sequence_and_needs_a_row_of_logits(tmp_path):
    write_qwen2(tmp_path)
    assert read(tmp_path, TINY).end_ids == (0,)
    write_checkpoint(tmp_path, TINY | {"eos_token_id": None})
    assert refusal(tmp_path).endswith("missing keys ['eos_token_id']")


# Tensors


@pytest.mark.parametrize(
    "name, tensor, complaint",
    [
        ("model.norm.weight", None, 'Missing key(s) in state_dict: "ln_f.weight"'),
        ("lm_head.weight", None, 'Missing key(s) in state_dict: "ff_out.weight"'),
        ("model.layers.1.self_attn.q_proj.bias", None, '"blocks.1.q_proj.bias"'),
        ("model.layers.0.self_attn.o_proj.bias", torch.zeros(8), "Unexpected key(s) in state_dict"),
        ("model.norm.weight", torch.zeros(9), "size mismatch for ln_f.weight"),
        ("model.norm.weight", torch.zeros(8, 1), "size mismatch for ln_f.weight"),
        ("model.layers.3.mlp.up_proj.weight", torch.zeros(6, 8), "3 layers, the files hold 4"),
        ("model.transformer.ln_f.weight", torch.zeros(8), "is in the checkpoint already"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, tensor, complaint):
    message = refusal(write_layout(tmp_path, "Dream", change={name: tensor})[0])
    assert message.startswith(str(tmp_path)) and complaint in message


def test_a_message_is_not_longer_than_what_it_says(tmp_path):
    """A mixture of experts once ended in one line of 193,599 characters."""
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": torch.zeros(6, 8)
        for layer in range(3)
        for expert in range(300)
    }
    folder, _, _ = write_layout(tmp_path, "Dream", change=experts)
    many_types = DREAM | {"layer_types": ["sliding_attention"] * 10**5}
    for values in DREAM, many_types:
        write_json(folder / "config.json", values)
        message = refusal(folder)
        assert len(message) < 700 + len(str(tmp_path)) and len(message.splitlines()) == 1


@pytest.mark.parametrize("size", [2**40, 2**62])
@pytest.mark.parametrize("key", ["n_layers", "d_model", "mlp_hidden_size", "embedding_size"])
def test_a_size_beyond_the_files_is_refused_before_a_model_is_built(tmp_path, key, size):
    """As many layers once were built until the memory was full."""
    message = refusal(write_checkpoint(tmp_path, TINY | {key: size}))
    assert message.startswith(f"{tmp_path}: ") and "config.json" in message


def test_no_weight_is_read_for_a_refusal(tmp_path):
    """256 MiB of embedding, and no more memory than for any other import of torch."""
    tensors = make_tensors() | {PREFIX + "wte.weight": torch.zeros(2**23, 8)}
    write_checkpoint(tmp_path, TINY, tensors)
    program = f"""
import resource, sys; sys.path.insert(0, {str(ROOT)!r})
from model import Transformer
import safetensors.torch, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Transformer.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print("size mismatch for wte.weight" in str(error))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    refused, mebibytes = told.stdout.split()
    assert refused == "True" and int(mebibytes) < 100


@pytest.mark.parametrize("stored", [torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_tensor_that_is_no_float_of_16_bits_or_more_is_refused(tmp_path, stored, dtype):
    tensors, name = make_tensors(), PREFIX + "blocks.1.ff_proj.weight"
    tensors[name] = tensors[name].to(stored)
    message = refusal(write_checkpoint(tmp_path, tensors=tensors), dtype=dtype)
    complaint = f"{name!r} is {stored}, should be one of ['float64', 'float32', 'bfloat16', "
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: {complaint}")


def test_mixed_dtypes_are_refused_unless_one_is_asked_for(tmp_path):
    tensors, name = make_tensors(dtype=torch.bfloat16), PREFIX + "wte.weight"
    tensors[name] = tensors[name].float()
    message = refusal(write_checkpoint(tmp_path, tensors=tensors, n_shards=2))
    assert "mixes ['torch.bfloat16', 'torch.float32']" in message and "--dtype" in message
    loaded = Transformer.from_pretrained(tmp_path, dtype=torch.float64)
    assert holds(loaded, {name: tensor.double() for name, tensor in tensors.items()})


# Arguments


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"dtype": torch.int32}, "dtype is torch.int32, should be None or one of ['float64', "),
        ({"dtype": ["float32"]}, "dtype is ['float32'], should be None or one of"),
        ({"dtype": "half"}, "dtype is half, should be None or one of ['float64', 'float32', "),
        ({"device": "foo"}, "device is 'foo'"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"device": "foo", "path": "not/yet-downloaded"}, "device is 'foo'"),
        ({"revision": "main"}, "revision is 'main'"),
    ],
)
def test_an_argument_out_of_the_question_is_named(tmp_path, arguments, complaint):
    arguments = {"path": write_checkpoint(tmp_path)} | arguments
    assert refusal(**arguments).startswith(complaint)


# Files

SHARD = "model-00001-of-00002.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123456789\n"
NO_JSON = {
    "missing": (None, "No such file"),
    "truncated": (b'{"d_model": 8,', "Expecting property name"),
    "binary": (b"\xff\xfe\x00", "can't decode byte 0xff"),
    "endless-nesting": (b"[" * 100_000, "recursion"),
    "endless-number": (b'{"d_model": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    "list": (b"[1, 2]", "should hold a JSON object"),
    "pointer": (LFS, "a pointer that `git lfs pull` replaces"),
}
NO_MAP = {
    "missing": (None, "holds neither model.safetensors nor"),
    "no map": (b"{}", "has no weight_map"),
    "no object": (b'{"weight_map": ["wte"]}', "has no weight_map"),
    "empty map": (b'{"weight_map": {}}', "has no weight_map"),
}
NO_TENSORS = {
    "missing": (None, "missing or corrupt"),
    "empty": (b"", "missing or corrupt"),
    "pointer": (LFS, NO_JSON["pointer"][1]),
}
BROKEN = {"config.json": NO_JSON, INDEX: NO_JSON | NO_MAP, SHARD: NO_TENSORS}
BROKEN["tokenizer.json"] = {"pointer": NO_JSON["pointer"]}


@pytest.mark.parametrize(
    "file, kind", [(file, kind) for file, kinds in BROKEN.items() for kind in kinds]
)
def test_a_file_that_is_missing_or_broken_is_named_with_the_reason(tmp_path, file, kind):
    content, reason = BROKEN[file][kind]
    broken = write_checkpoint(tmp_path, n_shards=2) / file
    broken.unlink() if content is None else broken.write_bytes(content)
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path)) and file in message and reason in message


@given(st.integers(0, 10**6))
@example(0)
@example(8)
def test_a_file_cut_short_anywhere_is_refused(tmp_path_factory, length):
    file = write_checkpoint(tmp_path_factory.mktemp("cut")) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: length % len(whole)])
    assert refusal(file.parent).startswith(f"{file}: missing or corrupt")


@pytest.mark.parametrize("shard", ["../x", "{absolute}", "a/b", "", ".", "..", None, ["x"]])
def test_no_file_outside_the_folder_is_opened(tmp_path, shard):
    """Not even one that would do."""
    whole = write_checkpoint(tmp_path / "whole") / "model.safetensors"
    (tmp_path / "x").write_bytes(whole.read_bytes())
    if shard == "{absolute}":
        shard = str(whole)
    index = write_checkpoint(tmp_path / "index", n_shards=1) / INDEX
    write_json(index, {"weight_map": dict.fromkeys(make_tensors(), shard)})
    assert refusal(index.parent).startswith(f"{index}: shard {shard!r:.90}")


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    write_json(write_checkpoint(tmp_path) / "adapter_config.json", {"peft_type": "LORA"})
    assert refusal(tmp_path).startswith(f"{tmp_path / 'adapter_config.json'}: adapters are not")


# The hub, of which only the download is replaced


@pytest.mark.parametrize("load", [Transformer.from_pretrained, load_tokenizer])
def test_what_is_read_and_no_more_is_downloaded_of_the_revision(tmp_path, monkeypatch, load):
    folder, asked = write_llada_tokenizer(write_checkpoint(tmp_path)), {}

    def download(repo_id, **settings):
        asked.update(settings, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(model_file, "snapshot_download", download)
    load("GSAI-ML/LLaDA-8B-Instruct", revision="v2")
    assert (asked.pop("repo_id"), asked.pop("revision")) == ("GSAI-ML/LLaDA-8B-Instruct", "v2")
    data = ["config.json", "model-00001-of-00006.safetensors", INDEX, "vocab.json", "merges.txt"]
    data += ["chat_template.jinja"]
    other = ["modeling_llada.py", "pytorch_model.bin", "README.md", "a.pkl", "json.exe", "a.txt"]
    assert list(filter_repo_objects(data + other, **asked)) == data


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


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_download_that_fails_names_repository_and_reason(monkeypatch, kind):
    """The first line is only a number of HTTP."""

    def download(repo_id, **settings):
        raise kind(GATED + 100 * "\nand a page of advice")

    monkeypatch.setattr(model_file, "snapshot_download", download)
    message = refusal("some/model")
    assert message.startswith("'some/model' is no local folder")
    assert "Access to model some/model is restricted." in message
    assert len(message) < 600 and len(message.splitlines()) == 1

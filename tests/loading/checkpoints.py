"""Checkpoints made for tests: config.json, tensors and tokenizers of every layout."""

import json
from dataclasses import MISSING, asdict, fields
from itertools import cycle

import pytest
import torch
from model import Config, Transformer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from training import save_tensors

PREFIX = "model.transformer."
INDEX = "model.safetensors.index.json"
# Fields of Config under their names in LLaDA's config.json, and those without a default.
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

# config.json of Dream-7B, iLLaDA-8B and Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm, made tiny.
HF = {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 8, "initializer_range": 0.02}
HF |= {"intermediate_size": 6, "max_position_embeddings": 4096, "num_attention_heads": 4}
HF |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "use_cache": True}
HF |= {"bos_token_id": 8, "eos_token_id": 9, "rope_scaling": None, "vocab_size": 12}
DREAM = HF | {"architectures": ["DreamModel"], "model_type": "Dream", "rope_theta": 1000000.0}
DREAM |= {"mask_token_id": 11, "max_window_layers": 3, "pad_token_id": 9, "sliding_window": None}
DREAM |= {"tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False}
ILLADA = HF | {"model_type": "illada", "attention_bias": False, "head_dim": 2, "mlp_bias": False}
ILLADA |= {"layer_norm_eps": None, "rope_theta": 500000.0, "tie_word_embeddings": True}
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

# The control tokens of LLaDA-Instruct, and a way of its kind to cut a text into words.
LLADA_SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>"]
LLADA_SPECIAL += ["<|end_header_id|>", "<|eot_id|>"]
LLADA_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    words = ["a", "b", "c", "d", "e", "<[MASK]>", "g", "h", "i", "j", "k", "<|mask|>"]
    write_words(write_checkpoint(folder, values, stored, n_shards), words)
    return folder, config, tensors


def write_words(folder, words):
    """A tokenizer.json that gives every word its place in the list."""
    vocabulary = {word: i for i, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, words[0])).save(str(folder / "tokenizer.json"))


def byte_level_bpe(words, added):
    """A tokenizer that cuts at `words`; added: AddedTokens, which get the ids after VOCAB."""
    merges = [tuple(merge.split()) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(VOCAB)}, merges))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    for token in added:
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
    return tokenizer


def write_llada_tokenizer(folder, extra=()):
    """A tokenizer.json with the control tokens of LLaDA-Instruct, and extra AddedTokens."""
    special = [AddedToken(token, special=True) for token in LLADA_SPECIAL]
    byte_level_bpe(LLADA_WORDS, [*special, *extra]).save(str(folder / "tokenizer.json"))
    return folder


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


def refusal(path, load=Transformer.from_pretrained, **arguments):
    """The message of the ValueError raised, and of no special kind that slipped through."""
    with pytest.raises(ValueError) as caught:
        load(path, **arguments)
    assert type(caught.value) is ValueError, repr(caught.value)
    return str(caught.value)

"""The transformer of LLaDA and Dream, whose forward pass recomputes any subset of the positions.

A masked diffusion language model is a transformer without a causal mask: it reads a canvas of
prompt and [MASK] tokens and predicts a token at every position. `Transformer.forward` recomputes
the positions it is told to, writes their keys and values into a `KVCache`, and lets them attend to
all keys and values in there. Which positions are worth recomputing is not decided in this file.

LLaDA: arXiv 2502.09992, Dream: 2508.15487. Index order is always batch, position, head, channel:
    B  sequences                       H  query heads
    T  positions, prompt and response  G  key/value heads (G divides H)
    Q  positions recomputed, Q <= T    D  channels per head
    L  layers                          C  residual channels, H * D
    V  vocabulary
"""

import json
import sys
import warnings
from dataclasses import MISSING, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every number of rows, for 30 ms

DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}  # fmt: skip
# By model_type, the layouts known to be implemented: does row i - 1 of the logits predict i?
SHIFTED = {"llada": False, "illada": False, "a2d-qwen2": False, "Dream": True}
MAP_ROWS = 256  # query rows in a slice of the attention map: all take H * Q * T numbers


def require(condition, message):
    """ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


# ---- The transformer -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Shape of the model: keys of LLaDA's config.json. ValueError if they make no transformer."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int  # ids with a token; the embedding may have more rows
    embedding_size: int
    max_sequence_length: int
    rope_theta: float
    rms_norm_eps: float
    mask_token_id: int
    eos_token_id: int
    other_end_ids: tuple = ()  # tokens that end an answer too, such as <|eot_id|>
    include_qkv_bias: bool = False
    weight_tying: bool = False  # the embedding is the head too
    model_type: str = "llada"

    def __post_init__(self):
        require_a_transformer(self)

    @property
    def head_dim(self):
        return self.d_model // self.n_heads

    @property
    def shifted(self):
        """Whether row i - 1 predicts position i; row 0 also predicts position 0."""
        return SHIFTED[self.model_type]

    @property
    def end_ids(self):
        """Every id that ends an answer."""
        return (self.eos_token_id, *self.other_end_ids)

    @staticmethod
    def from_json(path):
        """The Config of a config.json, in LLaDA's layout or that of Hugging Face's Llama.

        The tokenizer's files beside it tell which ids have a token, and which end an answer.
        Raises ValueError naming file, key and value if one is missing or not implemented here.
        """
        return read_config(Path(path))


class KVCache:
    """Keys (after RoPE) and values of every layer and position: two (L, B, T, G, D) tensors."""

    def __init__(self, config, batch_size, seq_len, device, dtype):
        shape = (config.n_layers, batch_size, seq_len, config.n_kv_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def clear(self):
        """Nothing is left of an earlier decode."""
        self.k.zero_()
        self.v.zero_()

    def update(self, layer, rows, k, v):
        """Write k, v (B, Q, G, D) at rows of a layer.  -> all of the layer, 2 x (B, T, G, D)

        rows: the indices (B, 1) of sequences and (B, Q) of positions, as one pair.
        """
        self.k[layer][rows] = k.to(self.k.dtype)  # another one only under torch.autocast
        self.v[layer][rows] = v.to(self.v.dtype)
        return self.k[layer], self.v[layer]


def rope(positions, config, dtype):
    """Cosines and sines of the rotary embedding.  (B, Q) -> 2 x (B, Q, 1, D)

    The sines of the first half of the channels are negative, as `rotate` wants them.
    """
    channels = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_dim)
    angles = positions[:, :, None, None] * frequencies  # (B, Q) -> (B, Q, 1, D / 2)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # -> (B, Q, 1, D)


def rotate(x, cos, sin):
    """Turn channel pairs (i, i + D/2) of x (B, Q, heads, D) by their position's angle.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (a, b) -> (b, a)
    return (x * cos + swapped * sin).to(x.dtype)


def attend(q, k, v, padding=None):
    """Softmax attention of every query over all T positions.  (B, Q, H, D) -> (B, Q, H, D)"""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shares_keys = q.shape[1] != k.shape[1]
    seen = None if padding is None else ~padding[:, None, None]  # (B, T) -> (B, 1, 1, T)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=shares_keys).transpose(1, 2)


def attention_map(q, k, padding=None):
    """The weights of `attend`, averaged over heads.  (B, Q, H, D), (B, T, G, D) -> (B, Q, T)

    The kernels of `attend` keep no weights, so they are computed once more: softmax(q k / sqrt(D)).
    """
    B, Q, H, D = q.shape
    G = k.shape[2]
    q = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4)  # -> (B, G, H / G, Q, D)
    scores = (q * D**-0.5).flatten(2, 3) @ k.permute(0, 2, 3, 1)  # keys (B, G, D, T)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1).unflatten(2, (H // G, Q))  # -> (B, G, H / G, Q, T)
    return weights.mean(dim=(1, 2), dtype=torch.promote_types(q.dtype, torch.float32))


def sliced_attention_map(q, k, padding=None):
    """`attention_map` by slices of MAP_ROWS query rows: the weights of all heads take H Q T numbers."""
    slices = [attention_map(rows, k, padding) for rows in q.split(MAP_ROWS, dim=1)]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)


class Layer(nn.Module):
    """Attention, then a gated MLP; each reads the normalised residual stream and adds to it.

    LLaDA's checkpoint calls a layer a block. Here a block is a stretch of text.
    """

    def __init__(self, config):
        super().__init__()
        C = config.d_model
        kv = config.n_kv_heads * config.head_dim
        hidden = config.mlp_hidden_size
        bias = config.include_qkv_bias
        self.head_dim = config.head_dim

        self.attn_norm = nn.RMSNorm(C, config.rms_norm_eps)
        self.q_proj = nn.Linear(C, C, bias=bias)
        self.k_proj = nn.Linear(C, kv, bias=bias)
        self.v_proj = nn.Linear(C, kv, bias=bias)
        self.attn_out = nn.Linear(C, C, bias=False)

        self.ff_norm = nn.RMSNorm(C, config.rms_norm_eps)
        self.ff_proj = nn.Linear(C, hidden, bias=False)  # the gate
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, C, bias=False)

    def queries_keys_values(self, x, cos, sin):
        """What attention needs of each position.  (B, Q, C) -> (B, Q, H, D), 2 x (B, Q, G, D)"""
        h = self.attn_norm(x)
        q = self.q_proj(h).unflatten(-1, (-1, self.head_dim))  # (B, Q, C) -> (B, Q, H, D)
        k = self.k_proj(h).unflatten(-1, (-1, self.head_dim))  # -> (B, Q, G, D)
        v = self.v_proj(h).unflatten(-1, (-1, self.head_dim))

        turned = rotate(torch.cat([q, k], dim=2), cos, sin)  # both at once: fewer launches
        q, k = turned.split([q.shape[2], k.shape[2]], dim=2)
        return q, k, v

    def forward(self, x, attended):
        """Add what was attended to, (B, Q, H, D), then the MLP.  (B, Q, C) -> (B, Q, C)"""
        x = x + self.attn_out(attended.flatten(2))  # (B, Q, H, D) -> (B, Q, C)
        return x + self.mlp(self.ff_norm(x))

    def mlp(self, h):
        """(B, Q, C) -> (B, Q, C)"""
        return self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class Transformer(nn.Module):
    """LLaDA or Dream; modules carry the names of LLaDA's checkpoint.

    A new one has random weights, to be trained; `from_pretrained` loads them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = config.embedding_size
        C = config.d_model
        self.wte = nn.Embedding(rows, C, _weight=torch.empty(rows, C))
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.ln_f = nn.RMSNorm(C, config.rms_norm_eps)
        head = nn.Linear(C, rows, bias=False)
        self.ff_out = None if config.weight_tying else head
        self.wte.weight = nn.Parameter(head.weight.detach().clone())  # the embedding starts as it

    def forward(self, tokens, positions=None, cache=None, return_attention=False, padding=None):
        """Logits of the recomputed positions, (B, Q, V'); V' is config.embedding_size.

        tokens     (B, T) integers
        positions  (B, Q) integers, which may repeat: recompute these (None: all). They attend to
                   the keys and values just computed at these positions, and to those in the cache
                   everywhere else
        cache      KVCache of (B, T) positions, updated in place
        padding    (B, T) bool: nothing attends there. RoPE turns by differences of positions
                   alone, so padding in front of a sequence does not change it
        return_attention   return the attention too, averaged over heads, (L, B, Q, T)

        `model(tokens, torch.tensor([[3, 5]]), cache)` gives logits (1, 2, V'). If `config.shifted`,
        the row of position i predicts position i + 1.
        Raises ValueError for positions without a cache, or a cache of another shape.
        """
        hidden, maps = self.hidden_states(tokens, positions, cache, return_attention, padding)
        logits = self.head(hidden)
        return (logits, torch.stack(maps)) if return_attention else logits

    def hidden_states(
        self, tokens, positions=None, cache=None, return_attention=False, padding=None
    ):
        """`forward` up to the head: residual stream (B, Q, C); L maps (B, Q, T), if asked for."""
        positions = self.check_positions(tokens, positions, cache)
        sequences = torch.arange(len(tokens), device=tokens.device)[:, None]
        rows = (sequences, positions)

        x = self.wte(tokens[rows])  # (B, T) -> (B, Q) -> (B, Q, C)
        cos, sin = rope(positions, self.config, torch.promote_types(x.dtype, torch.float32))
        maps = []
        for layer, block in enumerate(self.blocks):
            q, k, v = block.queries_keys_values(x, cos, sin)
            if cache is not None:
                k, v = cache.update(layer, rows, k, v)  # (B, Q, G, D) -> (B, T, G, D)
            x = block(x, attend(q, k, v, padding))
            if return_attention:
                maps.append(sliced_attention_map(q, k, padding))
        return x, maps

    def head(self, hidden):
        """Residual stream -> logits.  (B, Q, C) -> (B, Q, V')"""
        head = self.wte if self.ff_out is None else self.ff_out
        return F.linear(self.ln_f(hidden), head.weight)

    @staticmethod
    def from_pretrained(path_or_repo_id, device="cpu", dtype=None, revision=None):
        """The model of a checkpoint folder or hub repository, frozen, read straight onto `device`.

        dtype None keeps the checkpoint's; revision is a branch, tag or commit of the repository.
        Raises ValueError, naming file, key or tensor, if anything in the folder is missing,
        corrupt, unsupported, or does not fit its config.json.
        """
        return load_model(path_or_repo_id, device, dtype, revision)

    @staticmethod
    def check_positions(tokens, positions, cache):
        """The positions to recompute, or ValueError if the cache does not fit them."""
        B, T = tokens.shape
        size = (B, T) if cache is None else tuple(cache.k.shape[1:3])
        require(size == (B, T), f"cache is for {size} tokens, should be for {(B, T)}")
        if positions is None:
            return torch.arange(T, device=tokens.device).expand(B, T)
        require(cache is not None, "cache is None, should hold what positions leave out")
        return positions


# ---- Checkpoints ---------------------------------------------------------------------------------

# Every key of config.json that changes what a model computes is a field of Config, or stands here
# with the one value implemented (absent is fine; None: absent, null, false, zero or empty), or is
# looked at in `read_config`. LLaDA's own keys, and what OLMo, its origin, has beside them:
IMPLEMENTED = dict(
    block_type="llama", block_group_size=1, activation_type="silu", include_bias=False,
    multi_query_attention=None, clip_qkv=None, layer_norm_type="rms", layer_norm_with_affine=True,
    bias_for_layer_norm=False, attention_layer_norm=False, input_emb_norm=False, scale_logits=False,
    rope=True, rope_full_precision=True, alibi=False, sliding_window=None,
)  # fmt: skip
# Those of the layout of Hugging Face's Llama, and of models that grew from it:
HF_IMPLEMENTED = dict(
    hidden_act="silu", mlp_bias=False, use_mrope=False, layer_norm_eps=None, rope_type="default",
    partial_rotary_factor=1.0, rotary_pct=1.0, qk_norm=None, use_qk_norm=None, qk_layernorm=None,
    final_logit_softcapping=None, attn_logit_softcapping=None, logit_scale=1.0, logits_scaling=1.0,
    attention_multiplier=None, embedding_multiplier=1.0, residual_multiplier=1.0,
    num_experts=None, num_local_experts=None, n_routed_experts=None, num_experts_per_tok=None,
    quantization_config=None, quantization=None, compression_config=None,
)  # fmt: skip
PLAIN_ROPE = dict(rope_type="default", type="default", factor=1.0, partial_rotary_factor=1.0)

# What config.json does not say: biases of q, k and v, and the mask where the tokenizer is silent.
QKV_BIAS = {"llada": False, "illada": False, "a2d-qwen2": True, "Dream": True}
MASK_TOKENS = {
    "llada": "<|mdm_mask|>", "illada": "<[MASK]>", "a2d-qwen2": "<|mask|>", "Dream": "<|mask|>",
}  # fmt: skip

# LLaDA's names are ours. The same in the layout of Hugging Face's Llama, which Dream follows:
HF_KEYS = dict(
    d_model="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads", mlp_hidden_size="intermediate_size",
    embedding_size="vocab_size", max_sequence_length="max_position_embeddings",
    weight_tying="tie_word_embeddings",
)  # fmt: skip
PREFIX = "model.transformer."
HEAD = PREFIX + "ff_out.weight"
HF_NAMES = {  # of tensors, and what LLaDA calls them
    "model.embed_tokens.": PREFIX + "wte.", "model.layers.": PREFIX + "blocks.",
    "model.norm.": PREFIX + "ln_f.", "lm_head.": PREFIX + "ff_out.",
    "input_layernorm.": "attn_norm.", "post_attention_layernorm.": "ff_norm.",
    "self_attn.o_proj.": "attn_out.", "self_attn.": "", "mlp.gate_proj.": "ff_proj.",
    "mlp.up_proj.": "up_proj.", "mlp.down_proj.": "ff_out.",
}  # fmt: skip
STORED_DTYPES = dict(zip(("F64", "F32", "BF16", "F16"), DTYPES.values()))


def require_a_transformer(config):
    """ValueError unless a Config has values of the right kind that belong together."""
    for f in fields(config):
        value = getattr(config, f.name)
        kinds = (int, float) if f.type is float else (f.type,)
        require(type(value) in kinds, f"{f.name} is {shown(value)}, should be {f.type.__name__}")
        if f.type in (int, float):
            least = 1 if f.type is int and not f.name.endswith("_id") else 0
            said = f"{f.name} is {shown(value)}, should be from {least} to 2**63"
            require(least <= value < 2**63, said)
    require_known(config.model_type)

    C, H, G = config.d_model, config.n_heads, config.n_kv_heads
    require(C % (2 * H) == 0, f"d_model is {C}, should be an even multiple of n_heads {H}")
    require(H % G == 0, f"n_heads is {H}, should be a multiple of n_kv_heads {G}")

    V, rows = config.vocab_size, config.embedding_size
    require(V <= rows, f"vocab_size is {V}, should be at most embedding_size {rows}")
    ids = {"mask_token_id": config.mask_token_id, "eos_token_id": config.eos_token_id}
    for name, id in [*ids.items(), *(("other_end_ids", id) for id in config.other_end_ids)]:
        fits = type(id) is int and 0 <= id < rows
        require(fits, f"{name} is {shown(id)}, should be from 0 to {rows - 1}")


def require_known(model_type, where=""):
    """ValueError unless the layout is one of those implemented."""
    known = list(SHIFTED)
    said = f"{where}model_type is {shown(model_type)}, but only {known} are implemented"
    require(model_type in known, said)


def shown(value):
    """A value for a message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def some(names):
    """The first few of many names, for a message."""
    listed = ", ".join(name[:100] for name in names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"


def read_config(path):
    """The Config of the config.json at `path`; see Config.from_json."""
    values = read_json(path)
    keys = {f.name: f.name for f in fields(Config)}
    if "hidden_size" in values:
        keys |= HF_KEYS
    # LLaDA's own keys may do without a model_type: nobody else has them.
    model_type = values.get("model_type", "llada" if "d_model" in values else None)
    require_known(model_type, where=f"{path}: ")
    refuse_what_is_not_implemented(path, values)

    ours = {name: values.get(key) for name, key in keys.items()}
    ours["model_type"] = model_type
    ours["rope_theta"] = rope_theta(path, values)
    if "hidden_size" in values:
        ours["include_qkv_bias"] = qkv_bias(path, values, model_type)

    ids = token_ids(path.parent)
    if ids and type(ours["vocab_size"]) is int:  # it may count embedding rows without a token
        ours["vocab_size"] = min(ours["vocab_size"], 1 + max(ids.values()))
    if ours["mask_token_id"] is None:
        ours["mask_token_id"] = mask_token_id(path.parent, ids, model_type)
    ends = end_ids(path, values)
    ours["eos_token_id"] = ends[0] if ends else None
    ours["other_end_ids"] = None  # it needs the size of the embedding, checked first

    config = make_config(path, ours, keys)
    head_dim = values.get("head_dim")
    said = f"{path}: head_dim is {shown(head_dim)}, but only {config.head_dim} is implemented"
    require(head_dim in (None, config.head_dim), said)

    turns = [ids[token] for token in END_OF_TURN if token in ids]
    others = dict.fromkeys(id for id in [*ends, *turns] if id < config.embedding_size)
    return replace(config, other_end_ids=tuple(id for id in others if id != config.eos_token_id))


def make_config(path, ours, keys):
    """The Config of values under our names (None: absent); a message names those of the file."""
    given = {name: value for name, value in ours.items() if value is not None}
    needed = [f.name for f in fields(Config) if f.default is MISSING]
    missing = dict.fromkeys(keys[name] for name in needed if name not in given)
    require(not missing, f"{path}: missing keys {list(missing)}")
    try:
        return Config(**given)
    except ValueError as error:
        message = str(error)
        for name, key in keys.items():
            message = message.replace(name, key)
        raise ValueError(f"{path}: {message}") from error


def refuse_what_is_not_implemented(path, values):
    """ValueError for a key that asks for another computation than the one above."""
    for key, implemented in (IMPLEMENTED | HF_IMPLEMENTED).items():
        value = values.get(key, implemented)
        same = value == implemented or not value and not implemented
        if key == "sliding_window" and values.get("use_sliding_window") is False:
            same = True  # some files hold one nevertheless
        said = f"{path}: {key} is {shown(value)}, but only {implemented!r} is implemented"
        require(same, said)

    types = values.get("layer_types") or []
    full = isinstance(types, list) and all(kind == "full_attention" for kind in types)
    said = f"{path}: layer_types is {shown(types)}, but only 'full_attention' is implemented"
    require(full, said)


def rope_theta(path, values):
    """The base of the rotary embedding, from wherever a file keeps it; ValueError if it scales."""
    thetas = [values.get("rope_theta")]
    for key in ("rope_scaling", "rope_parameters"):
        said = values.get(key) or {}
        plain = isinstance(said, dict) and all(
            name == "rope_theta" or name in PLAIN_ROPE and value in (None, PLAIN_ROPE[name])
            for name, value in said.items()
        )
        message = f"{path}: {key} is {shown(said)}, but only the default rope_type is implemented"
        require(plain, message)
        thetas.append(said.get("rope_theta"))

    thetas = [theta for theta in thetas if theta is not None]
    one = all(theta == thetas[0] for theta in thetas)
    require(one, f"{path}: rope_theta is {shown(thetas)}, should be one number")
    return thetas[0] if thetas else None


def qkv_bias(path, values, model_type):
    """Whether q, k and v have biases: Qwen2 always, Llama never (or its output has one too)."""
    biased = QKV_BIAS[model_type]
    value = values.get("attention_bias")
    said = f"{path}: attention_bias is {shown(value)}, but only {biased} is implemented"
    require(value in (None, biased), f"{said} for {model_type}")
    return biased


def mask_token_id(folder, ids, model_type):
    """The id of [MASK], where config.json is silent; None if the tokenizer has none."""
    token = tokenizer_config(folder).get("mask_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        token = MASK_TOKENS[model_type]
    return ids.get(token) if isinstance(token, str) else None


def end_ids(path, values):
    """The ids that end an answer, as config.json and generation_config.json list them."""
    sources = {path: values}
    generation = path.parent / "generation_config.json"
    if generation.exists():
        sources[generation] = read_json(generation)

    found = []
    for file, said in sources.items():
        eos = said.get("eos_token_id")
        listed = eos if isinstance(eos, list) else [eos]
        right = all(id is None or type(id) is int and id >= 0 for id in listed)
        require(right, f"{file}: eos_token_id is {shown(eos)}, should be ids")
        found += listed
    return [id for id in found if id is not None]


def load_model(path_or_repo_id, device, dtype, revision):
    """The Transformer of a checkpoint; see Transformer.from_pretrained."""
    dtype = DTYPES.get(dtype, dtype)
    fault = f"dtype is {dtype}, should be None or of {list(DTYPES)}"
    require(dtype in (None, *DTYPES.values()), fault)
    require_device(device, torch.float32 if dtype is None else dtype)
    folder = checkpoint_folder(path_or_repo_id, revision)
    config = Config.from_json(folder / "config.json")
    adapter = folder / "adapter_config.json"
    require(not adapter.exists(), f"{adapter}: adapters are not implemented, should be merged")

    stored = stored_tensors(folder)
    dtypes = sorted({tensor.dtype for tensor in stored.values()}, key=str)
    said = f"{folder}: mixes {dtypes}, choose the dtype to convert all to (--dtype)"
    require(dtype is not None or len(dtypes) == 1, said)
    require_device(device, dtype or dtypes[0])

    require_sizes_within(folder, config, stored)
    with torch.device("meta"):
        model = Transformer(config)
    require_fit(folder, model, stored)

    tensors = read_tensors(stored, device, dtype)
    if config.weight_tying and HEAD in tensors:
        same = torch.equal(tensors.pop(HEAD), tensors[PREFIX + "wte.weight"])
        said = f"{folder}: the embedding is the head too, says config.json, but the files hold a"
        require(same, f"{said} head unlike it, {stored[HEAD].name}")
    parameters = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    model.load_state_dict(parameters, assign=True)
    return model.requires_grad_(False)


def require_device(device, dtype):
    """ValueError unless torch can compute on `device` in `dtype`."""
    try:
        torch.zeros(1, device=device, dtype=dtype).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device is {str(device)!r}, torch refuses {dtype}: {reason}") from error


def checkpoint_folder(path_or_repo_id, revision=None):
    """The local folder of a checkpoint, downloaded from the hub if it is not one already."""
    if str(path_or_repo_id) and Path(path_or_repo_id).is_dir():
        said = f"revision is {revision!r}, but {path_or_repo_id} is a local folder, which has none"
        require(revision is None, said)
        return Path(path_or_repo_id)

    patterns = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]
    try:
        repo_id = str(path_or_repo_id)
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    except Exception as error:  # errors of the hub, its cache and HTTP share no base class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = f"{str(path_or_repo_id)!r} is no local folder, and the hub does not give it"
        # The first line is a number of HTTP, the reason (gated? missing?) stands below.
        raise ValueError(f"{said}: {' '.join(lines[:4])[:500]}") from error
    return Path(folder)


def require_no_pointer(file):
    """ValueError if git-LFS left a pointer in place of a file."""
    mark = b"version https://git-lfs"
    if file.is_file():
        with open(file, "rb") as stream:
            pointer = stream.read(len(mark)) == mark
        require(not pointer, f"{file}: a pointer of git-LFS, `git lfs pull` gets the file itself")


def read_json(file):
    """The JSON object in a file; ValueError if there is none."""
    require_no_pointer(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no readable JSON file ({error})") from error
    require(isinstance(values, dict), f"{file}: holds {type(values)}, should hold a JSON object")
    return values


def shards(folder):
    """The safetensors files of a checkpoint: one, or those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    require(index.exists(), f"{folder}: holds neither {single.name} nor {index.name}")

    weight_map = read_json(index).get("weight_map")
    require(weight_map and isinstance(weight_map, dict), f"{index}: has no weight_map")
    for file in weight_map.values():
        # A checkpoint is somebody else's data: it must not make us read outside its folder.
        beside = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
        require(beside, f"{index}: shard {shown(file)} should be the name of a file beside it")
    return [folder / file for file in sorted(set(weight_map.values()))]


class Stored(NamedTuple):
    """A tensor of a checkpoint, as the head of its file describes it."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple


def stored_tensors(folder):
    """{LLaDA's name: Stored} of a checkpoint; no weight is read."""
    found = {}
    for file in shards(folder):
        require_no_pointer(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                heads = [(name, tensors.get_slice(name)) for name in tensors.keys()]
                heads = [(name, head.get_dtype(), head.get_shape()) for name, head in heads]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: missing, truncated or corrupt ({error})") from error
        for name, dtype, shape in heads:
            said = f"{file}: {shown(name)} is {dtype}, should be one of {list(STORED_DTYPES)}"
            require(dtype in STORED_DTYPES, said)
            ours = llada_name(name)
            require(ours not in found, f"{file}: {shown(name)} is in the checkpoint already")
            found[ours] = Stored(file, name, STORED_DTYPES[dtype], tuple(shape))
    require(found, f"{folder}: the safetensors files hold no tensor")
    return found


def llada_name(name):
    """What LLaDA calls a checkpoint's tensor."""
    for theirs, ours in HF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def require_sizes_within(folder, config, stored):
    """ValueError for a model larger than the files: such a one should not even be built."""
    C = config.d_model
    least = {  # numbers in some of the matrices that a size makes
        "d_model": C * C,
        "n_layers": config.n_layers * C * C,
        "mlp_hidden_size": config.mlp_hidden_size * C,
        "embedding_size": config.embedding_size * C,
    }
    held = sum(prod(tensor.shape) for tensor in stored.values())
    for name, numbers in least.items():
        key = name if config.model_type == "llada" else HF_KEYS[name]
        said = f"{folder / 'config.json'}: {key} is {getattr(config, name)}, but the files hold"
        require(numbers <= held, f"{said} only {held} numbers")


def require_fit(folder, model, stored):
    """ValueError unless the files hold the parameters of the model, in these shapes, alone."""
    wanted = {PREFIX + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if HEAD in stored:  # also beside an embedding that is the head
        wanted[HEAD] = wanted[PREFIX + "wte.weight"]
    missing = [name for name in wanted if name not in stored]
    unexpected = [tensor.name for ours, tensor in stored.items() if ours not in wanted]
    other_shape = [
        f"{tensor.name} {list(tensor.shape)} should be {list(wanted[ours])}"
        for ours, tensor in stored.items()
        if ours in wanted and tensor.shape != wanted[ours]
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
    lines = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
    require(not lines, "\n".join([f"{folder}: the tensors do not fit config.json", *lines]))


def read_tensors(stored, device, dtype):
    """{LLaDA's name: tensor} of a checkpoint, on `device` and in `dtype` (None: as stored)."""
    tensors = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, framework="pt") as opened:
            for ours, tensor in stored.items():
                if tensor.file == file:
                    tensors[ours] = opened.get_tensor(tensor.name).to(device=device, dtype=dtype)
    return tensors


# ---- Text ----------------------------------------------------------------------------------------

END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # LLaDA and Dream write them before the end of sequence
ADDED_TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
CONTROL = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>")
# How Qwen2, and so Dream, cuts a text into words.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def token_ids(folder):
    """{token: id} from a tokenizer's files, quicker than building it; {} if there are none."""
    single, vocabulary = folder / "tokenizer.json", folder / "vocab.json"
    if not single.exists() and not vocabulary.exists():
        return {}
    if not single.exists():
        added = {token.content: id for id, token in added_tokens(folder).items()}
        return integers(vocabulary, read_json(vocabulary) | added)

    values = read_json(single)
    try:
        vocab = values["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram's: pairs of a token and its score, in order
            vocab = {token: id for id, (token, _) in enumerate(vocab)}
        vocab = dict(vocab)
        added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{single}: no readable tokenizer ({error!r:.300})") from error

    # The tokenizers library ignores the ids of added tokens: they get the vocabulary's or the next.
    new = [token for token in added if token not in vocab]
    given = vocab | {token: len(vocab) + i for i, token in enumerate(new)}
    wrong = [token for token, id in added.items() if id != given[token]]
    require(not wrong, f"{single}: the ids of {some(wrong)} should follow the vocabulary's")
    return integers(single, given)


def integers(file, ids):
    """The {token: id} of a file, each id an integer; ValueError otherwise."""
    wrong = [token for token, id in ids.items() if type(id) is not int or id < 0]
    require(not wrong, f"{file}: the ids of {some(wrong)} should be integers from 0 on")
    return ids


def load_tokenizer(path_or_repo_id, revision=None):
    """The tokenizer of tokenizer.json, or else of Qwen2's three files; ValueError without any.

    One line on stderr if the checkpoint's own chat template is not the one used here.
    """
    folder = checkpoint_folder(path_or_repo_id, revision)
    file = folder / "tokenizer.json"
    require_no_pointer(file)
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else qwen2_tokenizer(folder)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"{file}: no readable tokenizer ({str(error)[:300]})") from error
    tokenizer.no_truncation()  # a file may have been saved with either, for training
    tokenizer.no_padding()

    base = "-base" in Path(path_or_repo_id).name.lower()
    note = note_on_the_template(template_of(tokenizer), own_template(folder), base)
    if note:
        print(f"note: {path_or_repo_id} {note}", file=sys.stderr)
    return tokenizer


def qwen2_tokenizer(folder):
    """Byte-level BPE of vocab.json and merges.txt, and the added tokens."""
    vocabulary, file = folder / "vocab.json", folder / "merges.txt"
    require(vocabulary.exists(), f"neither it nor {vocabulary.name} is there")
    require_no_pointer(file)
    merges = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line.strip() and not line.startswith("#version"):
            pair = tuple(line.split())
            require(len(pair) == 2, f"{file}: {shown(line)} should be two tokens to merge")
            merges.append(pair)

    tokenizer = Tokenizer(models.BPE(read_json(vocabulary), merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()

    added = added_tokens(folder)
    for token in added.values():
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
    got = {id: tokenizer.token_to_id(token.content) for id, token in added.items()}
    wrong = [token.content for id, token in added.items() if got[id] != id]
    require(not wrong, f"the ids of {some(wrong)} should follow the vocabulary's")
    return tokenizer


def tokenizer_config(folder):
    """What tokenizer_config.json says; {} if there is none."""
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.exists() else {}


def added_tokens(folder):
    """{id: AddedToken} of added_tokens.json and tokenizer_config.json, in order of the ids."""
    listed = folder / "added_tokens.json"
    described = tokenizer_config(folder).get("added_tokens_decoder") or {}
    said = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    require(isinstance(described, dict), f"{said} is {shown(described)}, should be an object")

    found = {}
    if listed.exists() or not described:
        for token, id in integers(listed, read_json(listed)).items():
            found[id] = AddedToken(token, special=True, normalized=False)
    for id, flags in described.items():
        try:
            found[int(id)] = AddedToken(**{name: flags[name] for name in ADDED_TOKEN_FLAGS})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{said} holds {shown(id)}: {shown(flags)}, no token") from error
    return dict(sorted(found.items()))


def llada_turns(messages):
    """LLaDA-Instruct's template: each of its control tokens, and the text behind it.

    messages: a list of {"role": ..., "content": ...}; the last turn is the answer's, open.
    """
    turns = [("<|startoftext|>", "")]
    for message in messages:
        turns.append(("<|start_header_id|>", message["role"]))
        turns.append(("<|end_header_id|>", "\n\n" + message["content"].strip()))
        turns.append(("<|eot_id|>", ""))
    return [*turns, ("<|start_header_id|>", "assistant"), ("<|end_header_id|>", "\n\n")]


def chatml_turns(messages):
    """The same in ChatML, Dream's template, which always starts with a system message."""
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    turns = []
    for message in messages:
        turns.append(("<|im_start|>", f"{message['role']}\n{message['content']}"))
        turns.append(("<|im_end|>", "\n"))
    return [*turns, ("<|im_start|>", "assistant\n")]


def chat_prompt(messages):
    """A conversation in LLaDA-Instruct's template, up to the answer, as one text."""
    return "".join(control + text for control, text in llada_turns(messages))


def chatml_prompt(messages):
    """A conversation in ChatML, up to the answer, as one text."""
    return "".join(control + text for control, text in chatml_turns(messages))


def template_of(tokenizer):
    """llada_turns or chatml_turns, if the tokenizer has the tokens of one; else None."""
    anything = [{"role": "user", "content": ""}]
    for turns in (llada_turns, chatml_turns):
        if all(tokenizer.token_to_id(control) is not None for control, _ in turns(anything)):
            return turns
    return None


def note_on_the_template(turns, own, base):
    """What a user should know if the chat template is not the model's own; else None."""
    if turns is None:
        return own and "has a chat template that is not implemented: the prompt goes without one"
    if own is None or base:
        return "looks like a base model: the prompt is put into a chat template all the same"
    if not resembles(own, turns):
        return "has a chat template other than the one that the prompt is put into here"
    return None


def own_template(folder):
    """The text of a checkpoint's chat template, for an engine that is not here; None if absent."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8", errors="replace")

    template = tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):  # of {"name": ..., "template": ...}
        named = [entry for entry in template if isinstance(entry, dict)]
        template = " ".join(str(entry.get("template")) for entry in named)
    return None if template is None else str(template)


def resembles(own, turns):
    """Whether a checkpoint's template holds what is fixed in ours, and no other system message."""
    own = own.replace("\\n", "\n")
    if turns is chatml_turns:
        return "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" in own
    fixed = ("<|start_header_id|>", "<|end_header_id|>\n\n", "trim", "<|eot_id|>", "bos_token")
    return all(text in own for text in fixed) and "system" not in own


def encode_prompt(tokenizer, text):
    """A user's text, in the chat template if there is one.  -> (1, P) ids, or ValueError

    Only the template's own control tokens become control ids: those that the text spells out stay
    text. A tokenizer cuts at control tokens first, so all ids are those of the whole template.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = text[error.start : error.end]
        raise ValueError(f"prompt holds {wrong!r}, half a character: no Unicode text") from error

    turns = template_of(tokenizer)
    pieces = [(None, text)] if turns is None else turns([{"role": "user", "content": text}])
    ids = []
    for control, piece in pieces:
        if control is not None:
            ids.append(tokenizer.token_to_id(control))
        ids += literal_ids(tokenizer, piece)
    require(ids, f"prompt is {text!r}, should hold at least one token")
    return torch.tensor([ids])


def literal_ids(tokenizer, text):
    """The ids of a text in which special tokens are text like any other, or ValueError."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = before

    unk = getattr(tokenizer.model, "unk_token", None)
    pieces = zip(encoding.tokens, encoding.offsets)
    unknown = [text[start:stop].strip() for token, (start, stop) in pieces if token == unk]
    require(not unknown, f"prompt: this model has no token for {unknown}")

    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {tokenizer.token_to_id(token) for token in (*CONTROL, *END_OF_TURN)}
    control = [token for token, id in zip(encoding.tokens, encoding.ids) if id in special]
    require(not control, f"prompt: this tokenizer takes {control} for control tokens")
    return encoding.ids


def decode_response(tokenizer, response, eos_token_id):
    """The text of a response, (gen_length,) ids, up to the first token that ends an answer.

    eos_token_id: one id or several; the tokenizer's end-of-turn tokens end an answer too.
    """
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    ends |= {tokenizer.token_to_id(token) for token in END_OF_TURN}
    ids = response.tolist()
    length = next((i for i, id in enumerate(ids) if id in ends), len(ids))
    return tokenizer.decode(ids[:length]).strip()

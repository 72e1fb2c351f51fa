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
import warnings
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, pre_tokenizers
from torch import nn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = (int, float) if f.type is float else (f.type,)
            fits = type(value) in kinds and (f.type in (str, tuple) or value >= 0)
            require(fits, f"{f.name} is {value!r}, should be {f.type.__name__}, not below 0")

        C, H, G = self.d_model, self.n_heads, self.n_kv_heads
        require(C % (2 * H) == 0, f"d_model is {C}, should be an even multiple of n_heads {H}")
        require(H % G == 0, f"n_heads is {H}, should be a multiple of n_kv_heads {G}")

        last = self.embedding_size - 1
        for name in ("mask_token_id", "eos_token_id"):
            id = getattr(self, name)
            require(id <= last, f"{name} is {id}, should be from 0 to {last}")

    @property
    def head_dim(self):
        return self.d_model // self.n_heads

    @property
    def shifted(self):
        """Whether row i - 1 predicts position i; row 0 also predicts position 0."""
        return self.model_type == "Dream"

    @property
    def end_ids(self):
        """Every id that ends an answer."""
        return (self.eos_token_id, *self.other_end_ids)

    @classmethod
    def from_json(cls, path):
        """Config of a config.json, in LLaDA's layout or that of Hugging Face's Llama.

        Raises ValueError if the file is missing or no JSON object, lacks a field, or asks for what
        is not implemented here. Keys that do not change inference are ignored.
        """
        values = config_values(Path(path))
        for key, implemented in (IMPLEMENTED | HF_IMPLEMENTED).items():
            value = values.get(key, implemented)
            same = value == implemented or value is False and implemented is None
            require(same, f"{path}: {key} is {value!r}, but only {implemented!r} is implemented")
        keys = HF_KEYS if "hidden_size" in values else {}
        needed = [f.name for f in fields(cls) if f.default is MISSING]
        missing = [keys.get(name, name) for name in needed if values.get(name) is None]
        require(not missing, f"{path}: missing keys {missing}")
        try:
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: {error}") from error


class KVCache:
    """Keys (after RoPE) and values of every layer and position: two (L, B, T, G, D) tensors."""

    def __init__(self, config, batch_size, seq_len, device, dtype):
        shape = (config.n_layers, batch_size, seq_len, config.n_kv_heads, config.head_dim)
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)

    def update(self, layer, positions, k, v):
        """Write k, v (B, Q, G, D) at positions (B, Q).  -> all of the layer, 2 x (B, T, G, D)"""
        sequences = torch.arange(len(positions), device=positions.device)[:, None]
        self.k[layer][sequences, positions] = k
        self.v[layer][sequences, positions] = v
        return self.k[layer], self.v[layer]


def rope(positions, config, dtype):
    """Cosines and sines of the rotary embedding.  (B, Q) -> 2 x (B, Q, 1, D)"""
    channels = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_dim)
    angles = positions[:, :, None, None] * frequencies  # (B, Q) -> (B, Q, 1, D / 2)
    angles = torch.cat([angles, angles], dim=-1)  # -> (B, Q, 1, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn channel pairs (i, i + D/2) of x (B, Q, heads, D) by their position's angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(q, k, v, padding=None):
    """Softmax attention of every query over all T positions.  (B, Q, H, D) -> (B, Q, H, D)"""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shares_keys = q.shape[1] != k.shape[1]
    mask = None if padding is None else ~padding[:, None, None]  # (B, T) -> (B, 1, 1, T)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=shares_keys).transpose(1, 2)


def attention_map(q, k, padding=None):
    """The weights of `attend`, averaged over heads.  (B, Q, H, D), (B, T, G, D) -> (B, Q, T)"""
    G, D = k.shape[2:]
    sharing = q.shape[2] // G  # query heads to a key head
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.transpose(1, 2).contiguous().transpose(2, 3)  # (B, T, G, D) -> (B, G, D, T)

    slices = []
    for rows in q.split(MAP_ROWS, dim=1):
        rows = rows.unflatten(2, (G, sharing)).permute(0, 2, 3, 1, 4)  # -> (B, G, H / G, rows, D)
        scores = rows.flatten(2, 3) * D**-0.5 @ keys  # one product for a whole group
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=wide).unflatten(2, (sharing, -1))
        slices.append(weights.mean(dim=(1, 2)))  # (B, G, H / G, rows, T) -> (B, rows, T)
    return torch.cat(slices, dim=1)


class Block(nn.Module):
    """One layer: attention, then a gated MLP, each on the normalised residual stream."""

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
        self.ff_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, C, bias=False)

    def forward(self, x, cos, sin, update, padding, return_attention):
        """x (B, Q, C) -> (B, Q, C), and the attention map (B, Q, T) or None."""
        attended, attention = self.attention(
            self.attn_norm(x), cos, sin, update, padding, return_attention
        )
        x = x + attended
        x = x + self.mlp(self.ff_norm(x))
        return x, attention

    def attention(self, h, cos, sin, update, padding, return_attention):
        """What each position reads from all T.  (B, Q, C) -> (B, Q, C), map (B, Q, T) or None

        update(k, v) puts the keys and values of the Q positions among those of all T; None: Q = T.
        """
        heads = (-1, self.head_dim)
        q = rotate(self.q_proj(h).unflatten(-1, heads), cos, sin)  # (B, Q, C) -> (B, Q, H, D)
        k = rotate(self.k_proj(h).unflatten(-1, heads), cos, sin)  # -> (B, Q, G, D)
        v = self.v_proj(h).unflatten(-1, heads)
        if update is not None:
            k, v = update(k, v)  # (B, Q, G, D) -> (B, T, G, D)

        attended = self.attn_out(attend(q, k, v, padding).flatten(2))  # (B, Q, H, D) -> (B, Q, C)
        return attended, attention_map(q, k, padding) if return_attention else None

    def mlp(self, h):
        """(B, Q, C) -> (B, Q, C)"""
        return self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class Transformer(nn.Module):
    """LLaDA or Dream; modules carry the names of LLaDA's checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = config.embedding_size
        C = config.d_model
        self.wte = nn.Embedding(rows, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.RMSNorm(C, config.rms_norm_eps)
        self.ff_out = None if config.weight_tying else nn.Linear(C, rows, bias=False)

    def forward(self, tokens, positions=None, cache=None, return_attention=False, padding=None):
        """Logits of the recomputed positions, (B, Q, V); every position if `positions` is None.

        tokens (B, T) and positions (B, Q) are integers; positions may repeat. All Q attend to all
        T: to the keys and values just computed where recomputed, else to those in the `cache`,
        updated in place; but nothing attends to `padding`, (B, T) bool. RoPE knows only distances,
        so padding before a sequence does not change it. With return_attention, also the
        head-averaged attention (L, B, Q, T). If `config.shifted`, row i predicts position i + 1.
        Raises ValueError for positions without a cache, or a cache of another shape.
        """
        hidden, maps = self.hidden_states(tokens, positions, cache, return_attention, padding)
        logits = self.head(hidden)
        return (logits, maps) if return_attention else logits

    def hidden_states(
        self, tokens, positions=None, cache=None, return_attention=False, padding=None
    ):
        """`forward` up to the head: residual stream (B, Q, C), and maps (L, B, Q, T) or None."""
        B, T = tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        else:
            require(cache is not None, "cache is None, should hold what positions leave out")
        size = (B, T) if cache is None else tuple(cache.k.shape[1:3])
        require(size == (B, T), f"cache is for {size} tokens, should be for {(B, T)}")

        x = self.wte(tokens.gather(1, positions))  # (B, T) -> (B, Q) -> (B, Q, C)
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rope(positions, self.config, wide)
        maps = None
        if return_attention:
            maps = x.new_empty(len(self.blocks), *positions.shape, T, dtype=wide)

        for layer, block in enumerate(self.blocks):
            update = None if cache is None else partial(cache.update, layer, positions)
            x, attention = block(x, cos, sin, update, padding, return_attention)
            if return_attention:
                maps[layer] = attention
        return x, maps

    def head(self, hidden):
        """Residual stream -> logits.  (B, Q, C) -> (B, Q, V)"""
        head = self.wte if self.ff_out is None else self.ff_out
        return F.linear(self.ln_f(hidden), head.weight)

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=None):
        """The model of a checkpoint folder or hub repository, frozen, read straight onto `device`.

        dtype None keeps the checkpoint's. Raises ValueError, naming file or tensor, if anything in
        the folder is missing, corrupt, unsupported, or does not fit its config.json.
        """
        require(dtype in (None, *DTYPES), f"dtype is {dtype}, should be None or of {DTYPES}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device is {str(device)!r}, torch refuses: {error}") from error
        folder = checkpoint_folder(path_or_repo_id)
        config = Config.from_json(folder / "config.json")
        tensors = read_tensors(folder, device, dtype)
        bias = any(name.endswith("q_proj.bias") for name in tensors)  # Dream's config says nothing
        config = replace(config, include_qkv_bias=bias or config.include_qkv_bias)
        if config.weight_tying:  # some files hold the head nevertheless
            tensors.pop("model.transformer.ff_out.weight", None)
        with torch.device("meta"):
            model = cls(config)
        named_as_in_file = nn.ModuleDict({"model": nn.ModuleDict({"transformer": model})})
        try:
            named_as_in_file.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the tensors do not fit config.json: {error}") from error
        return model.requires_grad_(False)


# ---- Checkpoints ---------------------------------------------------------------------------------

# Keys of config.json that change what the model computes, and the one value implemented here.
IMPLEMENTED = dict(
    block_type="llama", block_group_size=1, activation_type="silu", include_bias=False,
    multi_query_attention=None, clip_qkv=None, layer_norm_type="rms", layer_norm_with_affine=True,
    bias_for_layer_norm=False, attention_layer_norm=False, input_emb_norm=False, scale_logits=False,
    rope=True, rope_full_precision=True, rope_scaling=None, alibi=False, sliding_window=None,
)  # fmt: skip
HF_IMPLEMENTED = dict(hidden_act="silu", mlp_bias=False, use_mrope=False, rope_type="default")

# LLaDA's names are ours. The same in the layout of Hugging Face's Llama, which Dream follows:
HF_KEYS = dict(
    d_model="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads", mlp_hidden_size="intermediate_size",
    embedding_size="vocab_size", max_sequence_length="max_position_embeddings",
    weight_tying="tie_word_embeddings",
)  # fmt: skip
HF_NAMES = {  # of tensors, and what LLaDA calls them
    "model.embed_tokens.": "model.transformer.wte.", "model.layers.": "model.transformer.blocks.",
    "model.norm.": "model.transformer.ln_f.", "lm_head.": "model.transformer.ff_out.",
    "input_layernorm.": "attn_norm.", "post_attention_layernorm.": "ff_norm.",
    "self_attn.o_proj.": "attn_out.", "self_attn.": "", "mlp.gate_proj.": "ff_proj.",
    "mlp.up_proj.": "up_proj.", "mlp.down_proj.": "ff_out.",
}  # fmt: skip


def config_values(path):
    """The config.json at `path` under our keys; ids of tokens as the tokenizer beside has them."""
    folder = path.parent
    values = read_json(path) | {"other_end_ids": ()}
    if isinstance(values.get("rope_parameters"), dict):  # where newer files keep rope_theta
        values |= values["rope_parameters"]
    if "hidden_size" in values:
        values |= {ours: values[key] for ours, key in HF_KEYS.items() if key in values}
    if values.get("use_sliding_window") is False:  # some files hold one nevertheless
        values["sliding_window"] = None
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return values
    tokenizer, about = load_tokenizer(folder), folder / "tokenizer_config.json"
    if isinstance(values.get("vocab_size"), int):  # which may count embedding rows without a token
        n_ids = 1 + max(tokenizer.get_vocab().values(), default=-1)
        values["vocab_size"] = min(values["vocab_size"], n_ids)
    if values.get("mask_token_id") is None and about.exists():
        token = read_json(about).get("mask_token")
        token = token.get("content") if isinstance(token, dict) else token
        values["mask_token_id"] = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return values


def checkpoint_folder(path_or_repo_id):
    """The local folder of a checkpoint, downloaded from the hub if it is not one already."""
    if str(path_or_repo_id) and Path(path_or_repo_id).is_dir():
        return Path(path_or_repo_id)
    try:
        patterns = ["*.json", "*.safetensors", "merges.txt"]
        return Path(snapshot_download(str(path_or_repo_id), allow_patterns=patterns))
    except Exception as error:  # errors of the hub, its cache and HTTP share no base class
        said = f"{str(path_or_repo_id)!r} is no local folder, and the hub does not give it"
        raise ValueError(f"{said}: {str(error).strip().partition(chr(10))[0]}") from error


def read_json(path):
    """The JSON object in the file at `path`; ValueError if there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no readable JSON file ({error})") from error
    require(isinstance(values, dict), f"{path}: holds {type(values)}, should hold a JSON object")
    return values


def shards(folder):
    """The safetensors files of a checkpoint: one, or those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    require(index.exists(), f"{folder}: holds neither {single.name} nor {index.name}")
    weight_map = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict), f"{index}: has no weight_map")
    for file in weight_map.values():
        # A checkpoint is somebody else's data: it must not make us read outside its folder.
        beside = Path(str(file)).name == file and file not in ("", "..")
        require(beside, f"{index}: shard {file!r} should be the name of a file beside it")
    return [folder / file for file in sorted(set(weight_map.values()))]


def read_tensors(folder, device, dtype):
    """{LLaDA's name: tensor} of a checkpoint, on `device` and in `dtype` (None: as stored)."""
    tensors = {}
    for file in shards(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as stored:
                for name in stored.keys():
                    tensor = stored.get_tensor(name)
                    supported = tensor.dtype in DTYPES
                    require(supported, f"{file}: dtype {tensor.dtype} of {name} is not supported")
                    ours = llada_name(name)
                    require(ours not in tensors, f"{file}: {name} is in the checkpoint already")
                    tensors[ours] = tensor if dtype is None else tensor.to(dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: missing, truncated or corrupt ({error})") from error
    dtypes = {tensor.dtype for tensor in tensors.values()}
    require(len(dtypes) <= 1, f"{folder}: mixes {dtypes}, pass the dtype to convert all to")
    return tensors


def llada_name(name):
    """What LLaDA calls a checkpoint's tensor."""
    for theirs, ours in HF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


# ---- Text ----------------------------------------------------------------------------------------

# How Qwen2, and so Dream, cuts a text into words.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path_or_repo_id):
    """The tokenizer of tokenizer.json, or else of Qwen2's three files; ValueError without any."""
    file = checkpoint_folder(path_or_repo_id) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file)) if file.exists() else qwen2_tokenizer(file.parent)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"{file}: no readable tokenizer ({error})") from error


def qwen2_tokenizer(folder):
    """Byte-level BPE of vocab.json and merges.txt, then the tokens of added_tokens.json."""
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    tokenizer = ByteLevelBPETokenizer(*files, unicode_normalizer="nfc")
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    ids = read_json(folder / "added_tokens.json")
    tokenizer.add_special_tokens(sorted(ids, key=ids.get))
    wrong = [token for token in ids if tokenizer.token_to_id(token) != ids[token]]
    require(not wrong, f"added_tokens.json: the ids of {wrong} should follow those of vocab.json")
    return tokenizer


def chat_prompt(messages):
    """LLaDA-Instruct's template for a list of {"role": ..., "content": ...}, up to the answer."""
    header = "<|start_header_id|>{role}<|end_header_id|>\n\n"
    turns = [header.format(**turn) + turn["content"].strip() + "<|eot_id|>" for turn in messages]
    return "<|startoftext|>" + "".join(turns) + header.format(role="assistant")


def chatml_prompt(messages):
    """The same in ChatML, Dream's template, which always starts with a system message."""
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    turn = "<|im_start|>{role}\n{content}<|im_end|>\n"
    return "".join(turn.format(**message) for message in messages) + "<|im_start|>assistant\n"


def encode_prompt(tokenizer, text):
    """A user's text, in the chat template if there is one.  -> (1, P) ids, or ValueError"""
    templates = {"<|start_header_id|>": chat_prompt, "<|im_start|>": chatml_prompt}
    fits = [chat for token, chat in templates.items() if tokenizer.token_to_id(token) is not None]
    if fits:
        text = fits[0]([{"role": "user", "content": text}])
    encoding = tokenizer.encode(text, add_special_tokens=False)
    pieces = zip(encoding.tokens, encoding.offsets)
    unknown = [text[start:stop].strip() for token, (start, stop) in pieces if token == "<unk>"]
    require(not unknown, f"prompt: this model has no token for {unknown}")
    require(encoding.ids, f"prompt is {text!r}, should hold at least one token")
    return torch.tensor([encoding.ids])


def decode_response(tokenizer, response, eos_token_id):
    """The text of a response, (gen_length,) ids, up to its first end-of-sequence token."""
    ids = [*response.tolist(), eos_token_id]
    return tokenizer.decode(ids[: ids.index(eos_token_id)]).strip()

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
    V  vocabulary                      V' rows of the embedding, V' >= V
"""

import json
import re
import warnings
from collections import namedtuple
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew, 30 ms, for every Q

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
MAP_ROWS = 512  # queries in a slice of the attention map


# The layouts implemented, by model_type: whether row i - 1 of the logits predicts position i;
# whether q, k and v have biases, where config.json is silent; [MASK], where the tokenizer's is.
Layout = namedtuple("Layout", "shifted qkv_bias mask_token")
LAYOUTS = {
    "llada": Layout(shifted=False, qkv_bias=False, mask_token="<|mdm_mask|>"),
    "illada": Layout(shifted=False, qkv_bias=False, mask_token="<[MASK]>"),
    "a2d-qwen2": Layout(shifted=False, qkv_bias=True, mask_token="<|mask|>"),
    "Dream": Layout(shifted=True, qkv_bias=True, mask_token="<|mask|>"),
}


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
        """Dream: row i - 1 predicts position i, and row 0 position 0 too."""
        return LAYOUTS[self.model_type].shifted

    @property
    def end_ids(self):
        """Every id that ends an answer."""
        return (self.eos_token_id, *self.other_end_ids)


class KVCache:
    """Keys (after RoPE) and values of every layer and position: two (L, B, T, G, D) tensors."""

    def __init__(self, config, batch_size, seq_len, device, dtype):
        shape = (config.n_layers, batch_size, seq_len, config.n_kv_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def clear(self):
        """Nothing is left of an earlier decode: NaN in padding would outlive its weight of 0."""
        self.k.zero_()
        self.v.zero_()

    def update(self, layer, rows, k, v):
        """Write k, v (B, Q, G, D) at rows of a layer.  -> all of the layer, 2 x (B, T, G, D)

        rows: the pair of indices in k[layer][sequences, positions], (B, 1) and (B, Q).
        """
        self.k[layer][rows] = k.to(self.k.dtype)  # under torch.autocast k is of another dtype
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

    A pair (a, b) becomes (a cos - b sin, b cos + a sin); sin brings its minus along.
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
    if Q > MAP_ROWS:  # in slices: the weights of all heads are B H Q T numbers
        slices = [attention_map(some, k, padding) for some in q.split(MAP_ROWS, dim=1)]
        return torch.cat(slices, dim=1)
    q = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4)  # -> (B, G, H / G, Q, D)
    scores = (q * D**-0.5).flatten(2, 3) @ k.permute(0, 2, 3, 1)  # keys (B, G, D, T)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1).unflatten(2, (H // G, Q))  # -> (B, G, H / G, Q, T)
    return weights.mean(dim=(1, 2), dtype=torch.promote_types(q.dtype, torch.float32))


class Layer(nn.Module):
    """All of a layer but attention, which needs the cache and stands in `hidden_states`.

    LLaDA's checkpoint calls a layer a block; here a block is a stretch of text.
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
        """Add to x what attention gives, (B, Q, H, D), and then the MLP.  (B, Q, C) -> same"""
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
        # The embedding starts as a copy of the head: nn.Embedding's own start, N(0, 1), would be
        # far too large for a head, and where they are tied it is one.
        self.wte.weight = nn.Parameter(head.weight.detach().clone())

    def forward(self, tokens, positions=None, cache=None, return_attention=False, padding=None):
        """Logits of the recomputed positions, (B, Q, V').

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
        B, T = tokens.shape
        size = (B, T) if cache is None else tuple(cache.k.shape[1:3])
        require(size == (B, T), f"cache is for {size} tokens, should be for {(B, T)}")
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        else:
            require(cache is not None, "cache is None, should hold what positions leave out")
        sequences = torch.arange(B, device=tokens.device)[:, None]
        rows = (sequences, positions)

        x = self.wte(tokens[rows])  # (B, T) -> (B, Q) -> (B, Q, C)
        cos, sin = rope(positions, self.config, torch.promote_types(x.dtype, torch.float32))
        maps = []
        for i, layer in enumerate(self.blocks):
            q, k, v = layer.queries_keys_values(x, cos, sin)
            if cache is not None:
                k, v = cache.update(i, rows, k, v)  # (B, Q, G, D) -> (B, T, G, D)
            x = layer(x, attend(q, k, v, padding))
            if return_attention:
                maps.append(attention_map(q, k, padding))
        return x, maps

    def head(self, hidden):
        """Residual stream -> logits.  (B, Q, C) -> (B, Q, V')"""
        head = self.wte if self.ff_out is None else self.ff_out
        return F.linear(self.ln_f(hidden), head.weight)

    @staticmethod
    def from_pretrained(path_or_repo_id, device="cpu", dtype=None, revision=None):
        """The model of a checkpoint folder or hub repository, frozen, read straight onto `device`.

        dtype is a torch.dtype or its name in DTYPES; None keeps the checkpoint's. revision is a
        branch, tag or commit of the repository.
        Raises ValueError, naming file, key or tensor, if anything in the folder is missing,
        corrupt, unsupported, or does not fit its config.json.
        """
        return load_model(path_or_repo_id, device, dtype, revision)


# ---- Files ---------------------------------------------------------------------------------------

OR_LFS_POINTER = ", or a pointer that `git lfs pull` replaces"


def shown(value):
    """A value for a message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def checkpoint_folder(path_or_repo_id, revision=None):
    """The local folder of a checkpoint, downloaded from the hub if it is not one already."""
    name = str(path_or_repo_id)
    if name and Path(name).is_dir():  # Path("") is the current folder
        local = f"revision is {revision!r}, but {name} is a local folder, which has none"
        require(revision is None, local)
        return Path(name)

    patterns = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # errors of the hub, its cache and HTTP share no base class
        # The first line is a status of HTTP, the reason (gated? missing?) stands below.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"the hub does not give it: {' '.join(lines[:4])[:500]}"
        raise ValueError(f"{name!r} is no local folder, and {reason}") from error


def read_json(file):
    """The JSON object in a file; ValueError if there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no readable JSON{OR_LFS_POINTER} ({error})") from error
    require(isinstance(values, dict), f"{file}: holds {type(values)}, should hold a JSON object")
    return values


def read_optional_json(file):
    """The JSON object in a file; {} if there is no such file."""
    return read_json(file) if file.exists() else {}


# ---- Text ----------------------------------------------------------------------------------------

# The chat templates of LLaDA-Instruct (which strips the text) and of Dream, for a single question.
LLADA_TEMPLATE = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATML_TEMPLATE = CHATML_SYSTEM + "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
CONTROL = re.compile(r"(<\|\w+\|>)")  # a group, so that split keeps them
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # models write them before the end of sequence

# How Qwen2, and so Dream, cuts a text into words.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of an added token of which only the id is known.
PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def load_tokenizer(path_or_repo_id, revision=None):
    """The tokenizer of tokenizer.json, or else of Qwen2's three files; ValueError without any."""
    folder = checkpoint_folder(path_or_repo_id, revision)
    tokenizer = read_tokenizer(folder)
    neither = f"{folder}: no readable tokenizer (neither tokenizer.json nor vocab.json is there)"
    require(tokenizer is not None, neither)
    return tokenizer


def read_tokenizer(folder):
    """The Tokenizer of a checkpoint's folder; None if it has none; ValueError if it is damaged."""
    file = folder / "tokenizer.json"
    if not file.exists() and not (folder / "vocab.json").exists():
        return None

    try:
        if file.exists():
            values = read_json(file)
            tokenizer = Tokenizer.from_file(str(file))
        else:
            values = qwen2_tokenizer(folder)
            tokenizer = Tokenizer.from_str(json.dumps(values))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library, which is in Rust, is no Exception
        raise ValueError(f"{folder}: no readable tokenizer ({str(error)[:500]})") from error

    tokenizer.no_truncation()  # a file saved for training may truncate and pad
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text: a user cannot write control tokens

    # The library numbers added tokens from the vocabulary's end on, whatever ids the file gives.
    added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
    wrong = [token for token, id in added.items() if tokenizer.token_to_id(token) != id]
    require(not wrong, f"{folder}: the ids of {shown(wrong)} should follow the vocabulary's")
    return tokenizer


def qwen2_tokenizer(folder):
    """What tokenizer.json would hold, from the vocab.json and merges.txt that Dream has instead."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    into_words = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}}
    into_words |= {"behavior": "Isolated", "invert": False}
    into_bytes = {"type": "ByteLevel", "use_regex": False}
    into_bytes |= {"add_prefix_space": False, "trim_offsets": True}
    return {
        "added_tokens": added_tokens(folder),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [into_words, into_bytes]},
        "decoder": into_bytes,
        "model": {"type": "BPE", "vocab": read_json(folder / "vocab.json"), "merges": merges},
    }


def added_tokens(folder):
    """Entries for tokenizer.json's "added_tokens", in the order of their ids.

    From added_tokens.json; entries of tokenizer_config.json, which know more, replace them.
    ValueError if there is neither.
    """
    listed = folder / "added_tokens.json"
    described = read_optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    found = {}
    if listed.exists() or not described:
        for token, id in read_json(listed).items():
            found[id] = PLAIN_TOKEN | {"id": id, "content": token, "special": True}
    for id, token in (described or {}).items():
        found[int(id)] = token | {"id": int(id)}
    return [found[id] for id in sorted(found)]


def template_of(tokenizer):
    """The chat template all of whose control tokens the tokenizer has, or None.

    So a base model gets one too. A template of the checkpoint's own is never read.
    """
    for template in (LLADA_TEMPLATE, CHATML_TEMPLATE):
        if all(tokenizer.token_to_id(token) is not None for token in CONTROL.findall(template)):
            return template
    return None


def encode_prompt(tokenizer, text):
    """A user's text, in the chat template if there is one.  -> (1, P) ids, or ValueError

    Only the template's own control tokens become control ids. Those that the text spells out stay
    text, as `load_tokenizer` sees to; with another tokenizer they are refused. Piece by piece gives
    the ids of the whole, as a tokenizer cuts at control tokens first.
    """
    template = template_of(tokenizer) or "{text}"
    if template == LLADA_TEMPLATE:
        text = text.strip()

    ids = []
    for piece in CONTROL.split(template):
        if CONTROL.fullmatch(piece):
            ids.append(tokenizer.token_to_id(piece))
        else:
            ids += literal_ids(tokenizer, piece.replace("{text}", text))
    require(ids, f"prompt is {text!r}, should hold at least one token")
    return torch.tensor([ids])


def literal_ids(tokenizer, text):
    """The ids of a text; ValueError if a word became the unknown token, or a control token."""
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises nothing more specific
        wrong = f"prompt {shown(text)} cannot be encoded by this tokenizer ({error})"
        raise ValueError(wrong) from error

    unk = getattr(tokenizer.model, "unk_token", None)
    pieces = zip(encoding.tokens, encoding.offsets)
    unknown = [text[start:stop].strip() for token, (start, stop) in pieces if token == unk]
    require(not unknown, f"prompt: this model has no token for {unknown}")

    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    special.update(CONTROL.findall(LLADA_TEMPLATE + CHATML_TEMPLATE))
    control = [token for token in encoding.tokens if token in special]
    require(not control, f"prompt: this tokenizer takes {control} for control tokens")
    return encoding.ids


def decode_response(tokenizer, response, end_ids):
    """The text of a response, (gen_length,) ids, up to the first of end_ids, those of Config."""
    ids = response.tolist()
    length = next((i for i, id in enumerate(ids) if id in end_ids), len(ids))
    return tokenizer.decode(ids[:length]).strip()


# ---- Checkpoints ---------------------------------------------------------------------------------

# config.json may hold what a Config needs, these keys with the one value that is implemented, and
# keys without influence on a logit. Any other must be null, false, zero or empty, as it may ask for
# another computation. LLaDA's own keys come first, then those of Hugging Face's Llama and what grew
# from it.
FIXED = dict(
    block_type="llama", block_group_size=1, activation_type="silu", layer_norm_type="rms",
    layer_norm_with_affine=True, rope=True, rope_full_precision=True,
    hidden_act="silu", rope_type="default", type="default", factor=1.0, partial_rotary_factor=1.0,
    rotary_pct=1.0, logit_scale=1.0, logits_scaling=1.0, embedding_multiplier=1.0,
    residual_multiplier=1.0,
)  # fmt: skip
FREE = """
    alibi_bias_max attention_dropout attention_layer_norm_with_affine embedding_dropout
    flash_attention init_cutoff_factor init_device init_fn init_std mlp_ratio precision
    residual_dropout
    architectures attn_implementation auto_map bos_token_id dtype embd_pdrop gradient_checkpointing
    initializer_range max_window_layers pad_token_id pretraining_tp resid_pdrop return_dict
    tokenizer_class torch_dtype transformers_version unsloth_fixed unsloth_version use_cache
""".split()

# Our fields have LLaDA's names. Their names in the layout of Hugging Face's Llama, which Dream
# follows: its vocab_size counts the rows of the embedding, so both of our sizes are read from it.
HF_KEYS = dict(
    d_model="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads", mlp_hidden_size="intermediate_size",
    embedding_size="vocab_size", max_sequence_length="max_position_embeddings",
    include_qkv_bias="attention_bias", weight_tying="tie_word_embeddings",
)  # fmt: skip
TENSOR_NAMES = {  # part of a name in the files: what takes its place, in this order
    "model.transformer.": "", "model.embed_tokens.": "wte.", "model.layers.": "blocks.",
    "model.norm.": "ln_f.", "lm_head.": "ff_out.", "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ff_norm.", "self_attn.o_proj.": "attn_out.", "self_attn.": "",
    "mlp.gate_proj.": "ff_proj.", "mlp.up_proj.": "up_proj.", "mlp.down_proj.": "ff_out.",
}  # fmt: skip
# Tables that follow from the config; some checkpoints hold them nevertheless.
TABLES = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids")


def require_a_transformer(config):
    """ValueError unless a Config has values of the right kind that belong together."""
    for field in fields(config):
        value = getattr(config, field.name)
        name = f"{field.name} is {shown(value)}"
        kinds = (int, float) if field.type is float else (field.type,)
        require(type(value) in kinds, f"{name}, should be {field.type.__name__}")
        if field.type in (int, float):
            is_size = field.type is int and not field.name.endswith("_id")
            least = 1 if is_size else 0
            require(least <= value < 2**63, f"{name}, should be from {least} to 2**63")
    require_known(config.model_type)

    C, H, G = config.d_model, config.n_heads, config.n_kv_heads
    require(C % (2 * H) == 0, f"d_model is {C}, should be an even multiple of n_heads {H}")
    require(H % G == 0, f"n_heads is {H}, should be a multiple of n_kv_heads {G}")

    V, rows = config.vocab_size, config.embedding_size
    require(V <= rows, f"vocab_size is {V}, should be at most embedding_size {rows}")
    named = {"mask_token_id": [config.mask_token_id], "eos_token_id": [config.eos_token_id]}
    named["other_end_ids"] = config.other_end_ids
    for name, ids in named.items():
        for id in ids:
            has_row = type(id) is int and 0 <= id < rows
            require(has_row, f"{name} is {shown(id)}, should be from 0 to {rows - 1}")


def require_known(model_type, where=""):
    """ValueError unless the layout is one of those implemented."""
    known = list(LAYOUTS)
    unknown = f"{where}model_type is {shown(model_type)}, but only {known} are implemented"
    require(model_type in known, unknown)


def read_config(path):
    """The Config of a config.json, in LLaDA's layout or that of Hugging Face's Llama.

    1. The layout, by model_type, says under which names the shape stands.
    2. The id of [MASK] is the file's, or else that of the tokenizer beside it.
    3. A key that may ask for another computation is refused.
    4. The tokenizer tells which ids have a token, and it and the files which end an answer.
    Raises ValueError naming file, key and value if one is missing or not implemented here.
    """
    values = plain_values(path)
    if "hidden_size" not in values:
        values.setdefault("model_type", "llada")  # nobody else has its keys
    model_type = values.get("model_type")
    require_known(model_type, where=f"{path}: ")
    layout = LAYOUTS[model_type]

    # The key under which this file has a field of Config.
    key_of = {f.name: f.name for f in fields(Config) if f.name != "other_end_ids"}
    if "hidden_size" in values:
        key_of |= HF_KEYS
        values.setdefault("attention_bias", layout.qkv_bias)
    given = {name: values[key] for name, key in key_of.items() if key in values}

    tokenizer = read_tokenizer(path.parent)
    ids = {} if tokenizer is None else tokenizer.get_vocab()
    mask = mask_token(path.parent) or layout.mask_token
    if mask in ids:
        given.setdefault("mask_token_id", ids[mask])
    ends = listed_ends(path, values)
    if ends:
        given["eos_token_id"] = ends[0]  # config.json's first
    config = make_config(path, given, key_of)

    fixed = FIXED | {"head_dim": config.head_dim, "attention_bias": layout.qkv_bias}
    refuse_other_computations(path, values, fixed, read=key_of.values())

    # The embedding may have rows without a token, and not every id has a row.
    vocab_size = min(config.vocab_size, 1 + max(ids.values(), default=config.vocab_size))
    ends += [ids[token] for token in END_OF_TURN if token in ids]
    others = dict.fromkeys(id for id in ends if id < config.embedding_size)
    others.pop(config.eos_token_id)
    return replace(config, vocab_size=vocab_size, other_end_ids=tuple(others))


def plain_values(path):
    """What a config.json says, without nulls; keys of the two rope objects join the others."""
    values = without_nulls(read_json(path))
    for group in ("rope_scaling", "rope_parameters"):
        inner = values.pop(group, None) or {}
        require(isinstance(inner, dict), f"{path}: {group} is {shown(inner)}, should be an object")
        for key, value in without_nulls(inner).items():
            outer = values.setdefault(key, value)
            twice = f"{path}: {key} is {shown(outer)}, but {shown(value)} in {group}"
            require(outer == value, twice)

    # A window that is not used, and a list that calls every layer ordinary, ask for nothing.
    if values.get("use_sliding_window") is False:
        values.pop("sliding_window", None)
    types = values.get("layer_types")
    if isinstance(types, list) and all(kind == "full_attention" for kind in types):
        del values["layer_types"]
    return values


def without_nulls(values):
    """A dict without the keys that say nothing."""
    return {key: value for key, value in values.items() if value is not None}


def refuse_other_computations(path, values, fixed, read):
    """ValueError for any key that may ask for another computation than this file's."""
    for key, value in values.items():
        if key in fixed:
            other = f"{path}: {key} is {shown(value)}, but only {fixed[key]!r} is implemented"
            require(value == fixed[key], other)
        elif key in read or key in FREE or key.startswith("_"):
            continue
        else:
            unknown = f"{path}: {key[:100]} is {shown(value)}, and nothing here knows what it asks"
            require(not value, unknown)  # null, false, zero or empty asks for nothing


def make_config(path, given, key_of):
    """Config(**given). An error names a field by its key in the file, key_of[field]."""
    needed = [f.name for f in fields(Config) if f.default is MISSING]
    missing = dict.fromkeys(key_of[name] for name in needed if name not in given)
    require(not missing, f"{path}: missing keys {list(missing)}")
    try:
        return Config(**given)
    except ValueError as error:
        message = str(error)
        for name, key in key_of.items():
            message = message.replace(name, key)
        raise ValueError(f"{path}: {message}") from error


def mask_token(folder):
    """The text of [MASK] in tokenizer_config.json; None if that does not say it."""
    token = read_optional_json(folder / "tokenizer_config.json").get("mask_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def listed_ends(path, values):
    """The ids that end an answer, as config.json and generation_config.json list them."""
    generation = path.parent / "generation_config.json"
    sources = {path: values, generation: read_optional_json(generation)}
    found = []
    for file, source in sources.items():
        eos = source.get("eos_token_id")
        if eos is not None:
            listed = eos if isinstance(eos, list) else [eos]
            right = all(type(id) is int and id >= 0 for id in listed)
            require(right, f"{file}: eos_token_id is {shown(eos)}, should be ids")
            found += listed
    return found


def require_device(device, dtype):
    """ValueError unless torch can compute on `device` in `dtype`."""
    try:
        torch.zeros(1, device=device, dtype=dtype).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device is {str(device)!r}, torch refuses {dtype}: {reason}") from error


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


def map_tensors(folder):
    """{our name: tensor} of a checkpoint. load_file maps a file: a weight is read when used."""
    found = {}
    for file in shards(folder):
        try:
            stored = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: missing or corrupt{OR_LFS_POINTER} ({error})") from error

        for name, tensor in stored.items():
            if name.rpartition(".")[2] in TABLES:
                continue
            fault = f"{file}: {shown(name)} is {tensor.dtype}, should be one of {list(DTYPES)}"
            require(tensor.dtype in DTYPES.values(), fault)
            ours = name
            for theirs, part in TENSOR_NAMES.items():
                ours = ours.replace(theirs, part)
            require(ours not in found, f"{file}: {shown(name)} is in the checkpoint already")
            found[ours] = tensor
    require(found, f"{folder}: the safetensors files hold no tensor")
    return found


def require_layers(folder, config, tensors):
    """ValueError unless config.json counts the layers that the files hold.

    A damaged one may ask for so many that they could not even be built.
    """
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    other = f"{folder}: config.json counts {config.n_layers} layers, the files hold {layers}"
    require(config.n_layers == layers, other)


def drop_tied_head(folder, tensors):
    """Of a head that is the embedding, a second copy is taken out; ValueError if it is another."""
    if "ff_out.weight" in tensors:
        head = tensors.pop("ff_out.weight")
        embedding = tensors.setdefault("wte.weight", head)  # some files hold the head alone
        tied = f"{folder}: config.json says that the head is the embedding, the files hold another"
        same = torch.equal(head.to(embedding), embedding)
        require(same, f"{tied} (if that one is meant, say so in config.json)")


def load_model(path_or_repo_id, device, dtype, revision):
    """The Transformer of a checkpoint; see Transformer.from_pretrained."""
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, dtype)
    known = dtype is None or dtype in list(DTYPES.values())
    require(known, f"dtype is {dtype}, should be None or one of {list(DTYPES)}")
    require_device(device, dtype or torch.float32)

    folder = checkpoint_folder(path_or_repo_id, revision)
    config = read_config(folder / "config.json")
    adapter = folder / "adapter_config.json"
    require(not adapter.exists(), f"{adapter}: adapters are not implemented, should be merged")

    tensors = map_tensors(folder)
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    mixed = f"{folder}: mixes {dtypes}, choose the dtype to convert all to (--dtype)"
    require(dtype is not None or len(dtypes) == 1, mixed)
    if dtype is None:
        dtype = next(iter(tensors.values())).dtype
        require_device(device, dtype)

    require_layers(folder, config, tensors)
    if config.weight_tying:
        drop_tied_head(folder, tensors)
    try:
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{folder}: the tensors do not fit config.json: {reason}") from error
    return model.requires_grad_(False).to(device=device, dtype=dtype)

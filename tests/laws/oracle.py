"""The model and the method once more, the slow way: one sequence, one position, one head at a time.

It shares no code with the project. Keys and values live in a dict, memory[layer, position]; a
rollout is a product of T x T matrices; a policy is asked with plain lists turned into a State.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rope(x, position, theta):
    """One head's vector, turned at `position`: channels i and i + D/2 are a complex number."""
    D = len(x)
    turned = [0.0] * D
    for i in range(D // 2):
        angle = position / theta ** (2 * i / D)
        first, second = x[i].item(), x[i + D // 2].item()
        turned[i] = first * math.cos(angle) - second * math.sin(angle)
        turned[i + D // 2] = first * math.sin(angle) + second * math.cos(angle)
    return torch.tensor(turned, dtype=x.dtype)


def forward(weights, config, tokens, positions, memory):
    """Recompute `positions` of one sequence: their logits, and their attention rows by layer.

    memory[layer, position] = (keys, values), a list of vectors by key/value head each, is updated.
    """
    D = config.d_model // config.n_heads
    share = config.n_heads // config.n_kv_heads
    residual = {i: weights["wte.weight"][tokens[i]] for i in positions}
    maps = []
    for layer in range(config.n_layers):
        at = {name: weights[f"blocks.{layer}.{name}.weight"] for name in BLOCK}
        bias = {name: weights.get(f"blocks.{layer}.{name}.bias", 0) for name in BLOCK}
        queries = {}
        for i in residual:
            h = rms_norm(residual[i], at["attn_norm"], config.rms_norm_eps)
            q, k, v = (
                (at[name] @ h + bias[name]).split(D) for name in ("q_proj", "k_proj", "v_proj")
            )
            queries[i] = [rope(vector, i, config.rope_theta) for vector in q]
            memory[layer, i] = [rope(vector, i, config.rope_theta) for vector in k], v
        rows = {}
        for i in residual:
            outputs, row = [], torch.zeros(len(tokens), dtype=torch.float64)
            for head, q in enumerate(queries[i]):
                keys = torch.stack([memory[layer, j][0][head // share] for j in range(len(tokens))])
                values = torch.stack(
                    [memory[layer, j][1][head // share] for j in range(len(tokens))]
                )
                weight = torch.softmax(keys @ q / math.sqrt(D), dim=0)
                outputs.append(weight @ values)
                row += weight / config.n_heads
            rows[i] = row
            x = residual[i] + at["attn_out"] @ torch.cat(outputs)
            h = rms_norm(x, at["ff_norm"], config.rms_norm_eps)
            gate = at["ff_proj"] @ h
            residual[i] = x + at["ff_out"] @ (gate / (1 + torch.exp(-gate)) * (at["up_proj"] @ h))
        maps.append(rows)
    norm, head = weights["ln_f.weight"], weights.get("ff_out.weight", weights["wte.weight"])
    logits = {i: head @ rms_norm(x, norm, config.rms_norm_eps) for i, x in residual.items()}
    return logits, maps


BLOCK = "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out".split()


def density(known, sigma):
    """Certainty density of one sequence (a list of bools): the double sum of Eq. 3."""
    T = len(known)
    mass = sum(math.exp(-(d**2) / (2 * sigma**2)) for d in range(1 - T, T))
    gaussian = lambda d: math.exp(-(d**2) / (2 * sigma**2))  # noqa: E731
    return [sum(gaussian(i - j) for j in range(T) if known[j]) / mass for i in range(T)]


def rollout(maps, T):
    """Column sums of W_L ... W_1 as T x T products; maps as `forward` gives them.  Eq. 6-9."""
    product = torch.eye(T, dtype=torch.float64)
    for rows in maps:
        W = torch.eye(T, dtype=torch.float64)
        for i, row in rows.items():
            W[i] += row
            W[i] /= W[i].sum()
        product = W @ product
    return product.sum(dim=0)


def nucleus(scores, p, among):
    """Positions of the smallest set: add the highest score left until their share exceeds p."""
    ranked = sorted((i for i in range(len(scores)) if among[i]), key=lambda i: (-scores[i], i))
    total, held, inside = sum(scores[i] for i in ranked), 0.0, []
    for i in ranked:
        if inside and p < 1 and (held > p * total or scores[i] == 0):
            break
        inside.append(i)
        held += scores[i]
    return set(inside)


def order_of(sigma, gen_length, block_length):
    """Whether positions are committed by certainty prior, and sigma of the density."""
    paper = min(10.0, 10 * gen_length / 256)
    if sigma == "auto":
        return block_length is None, paper
    return sigma is not None, paper if sigma is None else sigma


def ask(policy, State, step, padding=None, **lists):
    """The positions that a policy chooses, given lists as a State of one sequence."""
    dtypes = {"confidence": torch.float64, "influence": torch.float64, "density": torch.float64}
    tensors = {}
    for name, values in lists.items():
        if values is not None:  # as the influence is without attention
            values = torch.tensor([values], dtype=dtypes.get(name))
        tensors[name] = values
    chosen = policy.choose(State(step=step, **tensors))
    return [i for i, c in enumerate(chosen[0].tolist()) if c]


def decode(
    model, State, prompt, gen_length, block_length, tokens_per_step, policy, sigma, threshold
):
    """`generate` for one prompt, a list: tokens, and (confidence, influence) after each step."""
    weights, config = model.state_dict(), model.config
    mask, P, T = config.mask_token_id, len(prompt), len(prompt) + gen_length
    by_prior, sigma = order_of(sigma, gen_length, block_length)
    before = 1 if config.model_type == "Dream" else 0  # which row predicts a position

    tokens = prompt + [mask] * gen_length
    known = [True] * P + [False] * gen_length
    decoded_at, recomputed_at = [0] * T, [0] * T
    confidence, influence = [0.0] * T, [1.0] * T if policy.uses_attention else None
    memory, history, step = {}, [], 0
    for start in range(P, T, block_length or gen_length):
        block = range(start, start + (block_length or gen_length))
        while not all(known[i] for i in block):
            around = density(known, sigma)
            positions = range(T)
            if step > 0:
                positions = ask(
                    policy,
                    State,
                    step,
                    tokens=tokens,
                    known=known,
                    decoded_at=decoded_at,
                    recomputed_at=recomputed_at,
                    confidence=confidence,
                    influence=influence,
                    density=around,
                    block=[i in block for i in range(T)],
                )
            step += 1

            to_predict = [i for i in positions if not known[i]]
            positions = sorted({*positions, *(max(i - before, 0) for i in to_predict)})
            logits, maps = forward(weights, config, tokens, positions, memory)
            for i in positions:
                recomputed_at[i] = step
            if policy.uses_attention:
                influence = rollout(maps, T).tolist()

            predicted = {}
            for i in to_predict:
                probability = torch.softmax(logits[max(i - before, 0)], dim=0).tolist()
                others = [id for id in range(config.vocab_size) if id != mask]
                predicted[i] = max(others, key=lambda id: probability[id])
                confidence[i] = probability[predicted[i]]

            score = [c * d if by_prior else c for c, d in zip(confidence, around)]
            ranked = sorted((i for i in block if i in predicted), key=lambda i: (-score[i], i))
            for rank, i in enumerate(ranked):
                if rank >= tokens_per_step and (threshold is None or confidence[i] < threshold):
                    continue
                tokens[i], known[i], decoded_at[i] = predicted[i], True, step
            history.append((list(confidence), influence))
    return tokens, history

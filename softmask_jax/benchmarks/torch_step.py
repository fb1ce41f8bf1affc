"""A plain PyTorch train step of a soft-masked DiT (arXiv 2510.17206), to compare ours with.

Dense logits, SUBS parameterisation, top-k of masked rows for the feedback, SDPA, fused AdamW, EMA. Two losses: "subs"
rewrites the log-probabilities of known tokens as MDLM's reference does (`kuleshov-group/mdlm`, whose module names these
are); "cross_entropy" gives them no weight, which is the same loss in less time. No other module imports PyTorch;
`against_torch` runs it in a process of its own.

B rows, L positions, D width, V vocabulary, K heads, M masked positions of the batch, k feedback size."""
import json
import math
import os
import time

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from softmask_jax.benchmarks.in_turn import answer, peak_resident_bytes

NEVER = -1e6  # logit of the mask, as in the reference
FREQUENCIES = 256  # width of the sinusoidal timestep features


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split, of x [B K L d] by cosines and sines [L d/2]."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).type_as(x)


class Block(nn.Module):
    """Attention and MLP with adaptive layer norm."""

    def __init__(self, width: int, heads: int, cond: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        gelu = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), gelu, nn.Linear(ratio * width, width))
        self.adaLN_modulation = nn.Linear(cond, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        qkv = self.attn_qkv(modulate(self.norm1(x), shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + gate1 * self.attn_out(mixed.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """MDLM's backbone without time conditioning, from embeddings to logits; no dropout."""

    def __init__(self, settings: dict):
        super().__init__()
        width, cond, heads = settings["hidden_size"], settings["cond_dim"], settings["num_heads"]
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.empty(settings["vocab_size"], width))
        self.sigma_map = nn.Module()
        self.sigma_map.mlp = nn.Sequential(nn.Linear(FREQUENCIES, cond), nn.SiLU(), nn.Linear(cond, cond))
        blocks = (Block(width, heads, cond, settings["mlp_ratio"]) for _ in range(settings["num_blocks"]))
        self.blocks = nn.ModuleList(blocks)
        self.output_layer = nn.Module()
        self.output_layer.norm_final = nn.LayerNorm(width, bias=False)
        self.output_layer.adaLN_modulation = nn.Linear(cond, 2 * width)
        self.output_layer.linear = nn.Linear(width, settings["vocab_size"])
        pairs = width // heads // 2
        frequencies = settings["rope_base"] ** (-torch.arange(pairs) / pairs)
        angles = torch.arange(settings["seq_len"])[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        at_zero = torch.cat([torch.ones(1, FREQUENCIES // 2), torch.zeros(1, FREQUENCIES // 2)], -1)
        self.register_buffer("sigma_features", at_zero, persistent=False)  # cosines and sines of sigma = 0

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B L D] -> logits [B L V]."""
        condition = functional.silu(self.sigma_map.mlp(self.sigma_features))[:, None]
        for block in self.blocks:
            x = block(x, condition, self.cos, self.sin)
        last = self.output_layer
        shift, scale = last.adaLN_modulation(condition).chunk(2, -1)
        return last.linear(modulate(last.norm_final(x), shift, scale))


class SoftMasking(nn.Module):
    """The learned scalars of lambda, and the mixture of the k likeliest embeddings."""

    def __init__(self):
        super().__init__()
        # The temperature is of the full-vocabulary variant: it gets no gradient here.
        for name in ("raw_scale", "raw_centre_neg", "raw_steep", "raw_temperature"):
            setattr(self, name, nn.Parameter(torch.zeros(())))

    def forward(self, x: Tensor, masked: Tensor, embedding: Tensor, feedback: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Embeddings [B L D] with soft masks. feedback: ids and log p [M k] of the likeliest, neg. entropy [M]."""
        ids, top, neg_entropy = feedback
        steepness = functional.softplus(self.raw_steep) + 1e-6
        centre = -functional.softplus(self.raw_centre_neg) - 1e-6
        weight = torch.sigmoid(self.raw_scale) * torch.sigmoid(steepness * (neg_entropy - centre))
        mixture = (top.softmax(-1)[..., None] * functional.embedding(ids, embedding)).sum(-2)
        return x.masked_scatter(masked[..., None], torch.lerp(x[masked], mixture, weight[:, None]))


class Trainer(nn.Module):
    """A network with its optimiser and EMA; settings of `against_torch.settings_for_torch`."""

    def __init__(self, settings: dict):
        super().__init__()
        self.settings, self.k, self.mask = settings, settings["k"], settings["vocab_size"] - 1
        self.backbone, self.tran_head = DiT(settings), SoftMasking()
        self.to(settings["device"])
        start = load_file(settings["start"], device=settings["device"])
        self.noise = [{name: start.pop(f"{name}.{step}") for name in ("xt", "weights")} for step in range(2)]
        self.tokens = start.pop("tokens").long()
        self.load_state_dict(start)
        groups = [{"params": [*part.parameters()], "peak": settings[rate]} for part, rate in
                  ((self.backbone, "learning_rate"), (self.tran_head, "sm_learning_rate"))]
        betas = settings["b1"], settings["b2"]
        self.optimizer = torch.optim.AdamW(
            groups, betas=betas, eps=settings["eps"], weight_decay=settings["weight_decay"], fused=True)
        self.averaged = [p.detach().clone() for p in self.backbone.parameters()]
        self.updates = 0

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B L V] float32 of embeddings [B L D], the mask impossible."""
        logits = self.backbone(x).float()
        logits[..., self.mask] += NEVER
        return logits

    def nll(self, logits: Tensor, xt: Tensor) -> Tensor:
        """-log p(x_0) [B L]: 0 at known tokens with "subs", else left to the weights."""
        if self.settings["loss"] == "cross_entropy":
            nll = functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten(), reduction="none")
            return nll.view_as(xt)
        log_p, known = logits - logits.logsumexp(-1, keepdim=True), xt != self.mask
        log_p[known] = NEVER
        log_p[known, xt[known]] = 0
        return -log_p.gather(-1, self.tokens[..., None])[..., 0]

    def corrupt(self) -> dict[str, Tensor]:
        """x_t [B L] and the NELBO's weights [B L] of fresh noise, t stratified over the rows, 1e-3 <= t <= 1."""
        rows, length = self.tokens.shape
        device = self.tokens.device
        t = (torch.rand(rows, device=device) + torch.arange(rows, device=device)) / rows
        t = ((1 - 1e-3) * t + 1e-3)[:, None]
        masked = torch.rand(rows, length, device=device) < (1 - 1e-3) * t
        return {"xt": self.tokens.masked_fill(masked, self.mask), "weights": torch.where(masked, 1 / t / length, 0.0)}

    def loss(self, xt: Tensor, weights: Tensor, passes: int) -> Tensor:
        """Algorithm 1: pass 1 on plain masks without a gradient, its prediction mixed into the masks of pass 2."""
        xt, masked, embedding = xt.long(), xt == self.mask, self.backbone.vocab_embed.embedding
        bfloat16 = self.settings["compute_dtype"] == "bfloat16"
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=bfloat16):
            x = functional.embedding(xt, embedding)
            if passes == 2:
                with torch.no_grad():
                    log_p = self.logits(x)[masked].log_softmax(-1)
                    top, ids = log_p.topk(self.k)
                    neg_entropy = (log_p.exp() * log_p).sum(-1)
                x = self.tran_head(x, masked, embedding, (ids, top, neg_entropy))
            nll = self.nll(self.logits(x), xt)
        return (weights * nll).sum(-1).mean()

    def step(self, passes: int) -> float:
        """One update on fresh noise; returns the loss."""
        loss = self.loss(**self.corrupt(), passes=passes)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), self.settings["clip_norm"])
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, self.updates / max(self.settings["warmup_steps"], 1))
        self.optimizer.step()
        self.updates += 1
        decay = min(self.settings["ema_decay"], (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            for average, value in zip(self.averaged, self.backbone.parameters(), strict=True):
                average.lerp_(value, 1 - decay)
        return loss.item()  # waits for the device

    @torch.no_grad()
    def losses(self, *passes: int) -> list[float]:
        """Losses before the first update: entry n uses the stored noise n and passes[n] passes."""
        return [self.loss(**noise, passes=number).item() for noise, number in zip(self.noise, passes, strict=True)]


def serve(settings: str) -> None:
    """Answer "losses", "step" and "peak" of `against_torch`; settings: JSON."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    trainer = Trainer(json.loads(settings))

    def step(passes: int) -> float:
        start = time.perf_counter()
        if not math.isfinite(trainer.step(passes)):
            raise FloatingPointError("PyTorch's loss is not finite")
        return time.perf_counter() - start

    def peak() -> int:
        on_gpu = trainer.tokens.is_cuda
        return torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()

    answer({"losses": trainer.losses, "step": step, "peak": peak, "version": lambda: torch.__version__})

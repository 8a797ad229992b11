"""The LoRA math: an adapted weight is W + B A, with the scaling alpha / rank folded into B.

`Adapter` holds the factors of one weight; `adapt` gives a module adapters in place, by making
its class a subclass that knows them:

- `AdaptedLinear` computes y = x Wᵀ + b + (x Aᵀ) Bᵀ and keeps nothing for backward but x;
- `AdaptedAttention` is any nn.MultiheadAttention: its packed projection of q, k and v does the same.

Both also answer `module.weight` or `module.in_proj_weight` with W + B A, so code that reads a
weight instead of calling its module sees the adapters too. The base weight stays where it was,
under its own name in the state dict, and is never written to while adapters are active.

LoRA: https://arxiv.org/abs/2106.09685, rsLoRA: https://arxiv.org/abs/2312.03732,
DoRA: https://arxiv.org/abs/2402.09353, PiSSA: https://arxiv.org/abs/2404.02948
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor of B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + (x Aᵀ) Bᵀ for a frozen W; x Aᵀ is recomputed in backward, not kept.

    Shapes: x (..., in), W (out, in), b (out), A (R, in), B (out, R). Under autocast every
    product is taken in the autocast dtype; A and B get gradients in their own dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        rows = x.reshape(-1, x.shape[-1])
        y.view(-1, y.shape[-1]).addmm_(rows @ A.to(dtype).T, B.to(dtype).T)
        ctx.save_for_backward(x, weight, A, B)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad
        rows, a, b = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)
        out = dy.reshape(-1, dy.shape[-1])
        out_b = out @ b
        dx = dA = dB = None
        if need_x:
            dx = (out @ weight.to(x.dtype)).addmm_(out_b, a).view(x.shape)
        if need_A:
            dA = (out_b.T @ rows).to(A.dtype)
        if need_B:
            dB = (out.T @ (rows @ a.T)).to(B.dtype)
        return dx, None, out.sum(0) if need_bias else None, dA, dB


class Adapter(nn.Module):
    """The factors of one named adapter of one weight, a pair for each adapted slice of its rows.

    Args:
        shape: (out, in) of the weight.
        slices: rows that each slice covers, e.g. {"q": (0, 256), "v": (512, 768)}.
        rank: rank of each slice.
        alpha: numerator of the scaling of each slice.
        dropout: share of A's input features dropped in training, for all tokens alike. It costs
            no memory and works where the weight is only read, as in nn.MultiheadAttention.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        use_dora: learn the norm of every row beside its direction.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        slices: dict[str, tuple[int, int]],
        rank: dict[str, int],
        alpha: dict[str, float],
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
    ):
        super().__init__()
        self.shape, self.slices, self.dropout, self.use_dora = tuple(shape), slices, dropout, use_dora
        self.scaling = {name: scaling(rank[name], alpha[name], use_rslora) for name in slices}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for name, (start, stop) in slices.items():
            self.lora_A[name] = nn.Parameter(torch.empty(rank[name], shape[1]))
            self.lora_B[name] = nn.Parameter(torch.zeros(stop - start, rank[name]))
            nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        self.lora_magnitude = nn.ParameterDict()
        self.start = None

    @torch.no_grad()
    def initialise(self, weight: Tensor, init: str = "kaiming") -> None:
        """Set what depends on the weight that is adapted: DoRA's magnitudes, PiSSA's factors.

        Args:
            weight: the base weight, (out, in).
            init: `kaiming` (B = 0) or `pissa` (the leading singular vectors of each slice).
        """
        for name, (start, stop) in self.slices.items():
            block = weight[start:stop].float()
            if self.use_dora:
                self.lora_magnitude[name] = nn.Parameter(block.norm(dim=1))
            if init == "pissa":
                rank = len(self.lora_A[name])
                U, S, Vh = torch.linalg.svd(block, full_matrices=False)
                root = S[:rank].sqrt()
                self.lora_A[name].copy_(root[:, None] * Vh[:rank])
                self.lora_B[name].copy_(U[:, :rank] * root / self.scaling[name])
        if init == "pissa":
            # PiSSA trains the leading part of W and freezes the rest. W itself stays as it is
            # here: the initial product is subtracted instead of being taken out of W.
            self.start = nn.ParameterDict(
                {f"{kind}_{name}": nn.Parameter(factors[name].clone(), requires_grad=False)
                 for kind, factors in (("A", self.lora_A), ("B", self.lora_B)) for name in self.slices}
            )

    def slice_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (rows, R) of one slice, scaling folded into B."""
        A, B = self.lora_A[name], self.scaling[name] * self.lora_B[name]
        if self.start is not None:
            A = torch.cat([A, self.start[f"A_{name}"]])
            B = torch.cat([B, -self.scaling[name] * self.start[f"B_{name}"]], 1)
        return A, B

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) of the whole weight: the slices' factors, block by block."""
        slices = {name: self.slice_factors(name) for name in self.slices}
        A = torch.cat([A for A, _ in slices.values()])
        B = torch.cat([
            F.pad(B, (0, 0, self.slices[name][0], self.shape[0] - self.slices[name][1]))
            for name, (_, B) in slices.items()
        ], 1)
        if self.training and self.dropout > 0:
            A = A * F.dropout(torch.ones_like(A[:1]), self.dropout)
        return A, B

    def row_scale(self, norm: Tensor) -> Tensor:
        """DoRA's factor of every row, (out,): magnitude over `norm`, that of the rows of W + B A, a constant."""
        parts, row = [], 0
        for name, (start, stop) in self.slices.items():
            parts += [norm.new_ones(start - row), self.lora_magnitude[name] / norm[start:stop]]
            row = stop
        return torch.cat([*parts, norm.new_ones(self.shape[0] - row)])


class Adapted:
    """Mixin of a module that carries adapters for one of its weights."""

    weight_name, bias_name = "weight", "bias"

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight as the base model has it (after `merge`: with the merged adapters)."""
        return self._parameters[self.weight_name]

    def active_adapters(self) -> list[Adapter]:
        """The adapters that the weight does not hold yet."""
        return [] if self.merged_from is not None else [self.adapters[n] for n in self.active]

    def active_factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B of all active adapters together, or None where there is none."""
        factors = [adapter.factors() for adapter in self.active_adapters()]
        if not factors:
            return None
        return torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors], 1)

    def row_scale(self, A: Tensor, B: Tensor) -> Tensor | None:
        """DoRA's factor of every row of W + B A, (out,), or None where no active adapter is one of DoRA."""
        scale = None
        for adapter in (a for a in self.active_adapters() if a.use_dora):
            if scale is None:
                with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
                    norm = (self.base_weight + B @ A).norm(dim=1)
                scale = torch.ones_like(norm)
            factor = adapter.row_scale(norm)
            scale, norm = scale * factor, norm * factor.detach()
        return scale

    def adapted_weight(self) -> Tensor:
        """W + B A (with DoRA: its rows scaled) in W's dtype, computed in that of A and B or better."""
        factors, weight = self.active_factors(), self.base_weight
        if factors is None:
            return weight
        A, B = factors
        with torch.autocast(weight.device.type, enabled=False):
            adapted, scale = weight + B @ A, self.row_scale(A, B)
            if scale is not None:
                adapted = scale[:, None] * adapted
        return adapted.to(weight.dtype)

    def project(self, x: Tensor, factors: tuple | None, start: int = 0, stop: int | None = None) -> Tensor:
        """x times the rows of W + B A from start to stop, (..., stop - start), plus the bias."""
        rows, bias = slice(start, stop), self._parameters[self.bias_name]
        weight, bias = self.base_weight[rows], None if bias is None else bias[rows]
        if factors is None:
            return F.linear(x, weight, bias)
        A, B = factors
        scale = self.row_scale(A, B)
        y = low_rank_linear(x, weight, bias if scale is None else None, A, B[rows])
        if scale is not None:
            y = y * scale[rows].to(y.dtype)
            y = y if bias is None else y + bias.to(y.dtype)
        return y


class AdaptedLinear(Adapted):
    """nn.Linear with adapters."""

    weight = property(Adapted.adapted_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x, self.active_factors())


class AdaptedAttention(Adapted):
    """nn.MultiheadAttention with adapters for its packed projection, which does not return attention weights then."""

    weight_name, bias_name = "in_proj_weight", "in_proj_bias"

    in_proj_weight = property(Adapted.adapted_weight)

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options):
        """The arguments and first result are those of nn.MultiheadAttention; inputs have a batch dimension."""
        factors = self.active_factors()
        if factors is None and (need_weights or self.adapters):  # without its adapters the base, bit for bit
            options |= {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            return super().forward(query, key, value, **options)
        q, k, v = (self.split_heads(x) for x in self.project_inputs(query, key, value, factors))
        mask = additive_mask(attn_mask, key_padding_mask, q)
        out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(out.flatten(2)), None

    def project_inputs(self, query, key, value, factors) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in the layout of the inputs; those of one input in one product."""
        E = self.embed_dim
        if query is key and key is value:
            return self.project(query, factors).chunk(3, -1)
        if key is value:
            return self.project(query, factors, 0, E), *self.project(key, factors, E).chunk(2, -1)
        v = self.project(value, factors, 2 * E)
        if query is key:
            return *self.project(query, factors, 0, 2 * E).chunk(2, -1), v
        return self.project(query, factors, 0, E), self.project(key, factors, E, 2 * E), v

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, width of a head)"""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """x Wᵀ + b + (x Aᵀ) Bᵀ; the arguments are those of LowRankLinear."""
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep
        return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B)
    return LowRankLinear.apply(x, weight, bias, A, B)


def additive_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The sum of nn.MultiheadAttention's two masks, as scaled_dot_product_attention takes it.

    Args:
        attn_mask: (tokens, keys) or (batch x heads, tokens, keys); True is masked out, floats are added.
        key_padding_mask: (batch, keys), the same.
        q: queries (batch, heads, tokens, width of a head), whose dtype the result has.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.view(*q.shape[:2], *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    masks = [
        torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(q.dtype)
        for m in masks
    ]
    return sum(masks) if masks else None


@lru_cache(maxsize=None)
def _adapted_class(mixin: type, cls: type) -> type:
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"base_class": cls})


def adapt(module: nn.Module) -> nn.Module:
    """Make a linear or attention module able to carry adapters; does nothing where it is."""
    if not isinstance(module, Adapted):
        mixin = AdaptedAttention if isinstance(module, nn.MultiheadAttention) else AdaptedLinear
        module.__class__ = _adapted_class(mixin, type(module))
        module.adapters, module.active, module.merged_from = nn.ModuleDict(), (), None
    return module


def restore(module: nn.Module) -> nn.Module:
    """Undo `adapt`: the module is what it was, with the weight it has now."""
    module.__class__ = module.base_class
    del module.adapters, module.active, module.merged_from
    return module


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Write W + B A into the weight, keeping a copy of W: `unmerge` is exact."""
    if module.merged_from is None and module.active:
        was_training = module.training
        module.adapters.eval()
        adapted = module.adapted_weight()
        module.adapters.train(was_training)
        module.merged_from = module.base_weight.clone()
        module.base_weight.copy_(adapted)


@torch.no_grad()
def unmerge(module: nn.Module) -> None:
    """Put back the weight that `merge` replaced, bit for bit."""
    if module.merged_from is not None:
        module.base_weight.copy_(module.merged_from)
        module.merged_from = None

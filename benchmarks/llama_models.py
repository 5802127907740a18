"""LLaMA-shaped models of random weights, built layer by layer where they run: bfloat16, torch's INT4, packed FP4."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from judge import Judge, dense_judge, fp4_judge
from rivals import GROUP, Int4Linear, dequantize_int4, quantize_int4
from torch import nn

from llmfp4_kernels import FP4Linear, fuse_gated_mlps
from llmfp4_kernels.formats import recipe as recipe_named
from llmfp4_kernels.packed import PackedFP4
from llmfp4_kernels.quantizer.gptq import smoothing_factor
from llmfp4_kernels.quantizer.linear import quantize_linear
from llmfp4_kernels.quantizer.scales import scale_of_largest

BASE, INT4, FUSED = "bf16", f"torch int4 g{GROUP}", "fused"
INT4_ROUNDING = 2**-7
"""Of Σ|x||w|: weights, results and parts of sums in bf16."""


def random_weight(name: str, n: int, k: int, device) -> torch.Tensor:
    """bfloat16 [n, k], the same for the same name on the same kind of device; outputs of unit inputs are near 1."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(n, k, generator=generator, device=device) / k**0.5).bfloat16()


def random_model(shape: dict, linear_of: Callable[[str, int, int], nn.Module], device):
    """A LLaMA whose linear layers but lm_head are linear_of(name, n, k), the rest bfloat16. No other copy ever exists.

    shape: arguments of LlamaConfig.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=4096, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            made = linear_of if name != "lm_head" else functools.partial(dense_linear, device)
            model.set_submodule(name, made(name, module.out_features, module.in_features))
        elif isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(random_weight(name, *module.weight.shape, device), False)
        elif "weight" in module._parameters:
            module.weight = nn.Parameter(torch.ones(module.weight.shape, device=device, dtype=torch.bfloat16), False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model


def dense_linear(device, name: str, n: int, k: int) -> nn.Linear:
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(random_weight(name, n, k, device), requires_grad=False)
    return linear


def packed_weight(weight: torch.Tensor, recipe: str, largest: torch.Tensor) -> PackedFP4:
    """A recipe's formats with scales of largest magnitudes, `largest` [k] of the inputs: no search, no error feedback.

    A kernel takes as long for them.
    """
    recipe = recipe_named(recipe)
    if not (recipe.search or recipe.error_feedback):
        return quantize_linear(weight, recipe, largest[None])
    factor = smoothing_factor(largest) if recipe.smoothing else None
    packed = quantize_linear(weight.float() if factor is None else weight / factor, "minmax-w4a16")
    packed = dataclasses.replace(packed, x_factor=factor, recipe=recipe.name)
    if not recipe.activation_elements:
        return packed
    activation = packed.element if packed.element in recipe.activation_elements else recipe.activation_elements[0]
    static = {}
    if recipe.dynamic is None:
        static["x_scale"] = scale_of_largest(largest.amax(), activation)
        if recipe.preshift:
            shift = torch.log2(largest.amax() / largest.clamp_min(1e-30)).floor().clamp(0, activation.max_shift)
            static["shift"] = shift.to(torch.uint8)
    return dataclasses.replace(packed, activation=activation, dynamic=recipe.dynamic, **static)


@dataclass
class Entrant:
    """A model that takes part, and what its packed layers are judged by."""

    name: str
    model: nn.Module
    judges: dict[str, Callable[[], Judge]] = field(default_factory=dict)
    about: dict = field(default_factory=dict)


def bf16_entrant(shape: dict, device) -> Entrant:
    return Entrant(BASE, random_model(shape, functools.partial(dense_linear, device), device))


def int4_entrant(shape: dict, device) -> Entrant:
    """Raises BadInput for shapes that torch's kernel does not take."""

    def judge(name, n, k):
        codes, scales = quantize_int4(random_weight(name, n, k, device), GROUP)
        return dense_judge(dequantize_int4(codes, scales, GROUP), INT4_ROUNDING)

    judges = {}

    def linear(name, n, k):
        judges[name] = functools.partial(judge, name, n, k)
        return Int4Linear(dense_linear(device, name, n, k))

    return Entrant(INT4, random_model(shape, linear, device), judges)


def fp4_entrant(scheme: str, shape: dict, device, largest: dict[str, torch.Tensor]) -> Entrant:
    """scheme: a recipe, or recipe+FUSED, whose MLPs multiply by gate and up at once (fuse_gated_mlps)."""
    recipe, _, fused = scheme.partition("+")
    judges = {}

    def linear(name, n, k):
        layer = FP4Linear.from_packed(packed_weight(random_weight(name, n, k, device), recipe, largest[name]))
        judges[name] = functools.partial(fp4_judge, layer)
        return layer

    model = random_model(shape, linear, device)
    for name in fuse_gated_mlps(model) if fused else ():
        del judges[f"{name}.gate_proj"], judges[f"{name}.up_proj"]
        judges[f"{name}.gate_up_proj"] = functools.partial(fp4_judge, model.get_submodule(name).gate_up_proj)
    return Entrant(scheme, model, judges)


def largest_inputs(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: float32 [k]}: the largest magnitude of each input of the linear layers on a prompt."""
    found, hooks = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            keep = lambda _, x, name=name: found.update({name: x[0].flatten(0, -2).abs().amax(0).float()})  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(keep))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found

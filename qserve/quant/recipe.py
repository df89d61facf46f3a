"""Recipes: how a model is quantized, as data, by name."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args, get_origin, get_type_hints

from qserve.formats.checkpoint import QuantizationConfig
from qserve.models.names import layer_prefix
from qserve.quant.smooth import (
    SEARCHED_INPUTS,
    SEARCHED_OUTPUTS,
    LayerPass,
    OneOf,
    ReorderChannels,
    RotateValues,
    SmoothAttention,
    SmoothInputs,
    SmoothOutputs,
)

GroupSize = Literal["auto", -1, 64, 128]
"""Weights that share a scale: "auto" is the largest group that divides every linear, -1 a channel."""


class RecipeError(ValueError):
    """There is no recipe of this name, or it does not go with a setting."""


@dataclass(frozen=True)
class Recipe:
    """What is done to a model, in this order.

    rotation: multiply the residual stream by a Hadamard matrix; "measured" if that lowers the error
        of a few layers, quantized either way, on calibration text they were not fitted to.
    k_hadamard: rotate each head of queries and keys after RoPE. k_center: before that, subtract the
        keys' mean, which softmax does not see (SageAttention, arXiv 2410.02367).
    passes: what is done to each layer before rounding; with `guarded`, each only where the layer's
        error is not higher for it.
    grid: "span" reaches from each group's minimum to its maximum; "search" is where it loses least,
        inputs weighted by their mean squares; "output" where the linear's output does, or for
        queries and keys attention's.
    rounding: to the nearest code, or GPTQ. damping: of its second moments, in mean diagonals.
    propagation: how much of what the linears before lost is made up for, 0 to 1 (QEP,
        arXiv 2504.09629; GPTAQ, arXiv 2504.02692, is 1).
    wide_linears: linears kept at 8 bits with those fused to them: shell patterns of names within a
        layer ("mlp.down_proj") or in the model ("model.layers.0.*").
    group_size: of 4-bit weights.
    sequences, length: calibration windows and tokens of each.
    """

    name: str
    weight_bits: Literal[4, 8] = 4
    activation_bits: Literal[8, 16] = 8
    kv_bits: Literal[4, 8, 16] = 4
    rotation: Literal["never", "always", "measured"] = "never"
    k_hadamard: bool = False
    k_center: bool = False
    passes: tuple[LayerPass | OneOf, ...] = ()
    guarded: bool = False
    grid: Literal["span", "search", "output"] = "span"
    rounding: Literal["nearest", "gptq"] = "gptq"
    damping: float = 0.01
    propagation: float = 0.0
    wide_linears: tuple[str, ...] = ()
    group_size: GroupSize = "auto"
    sequences: int = 32
    length: int = 512

    def __post_init__(self) -> None:
        """Recipes are written by hand: a slip must not pass for another choice."""
        for field, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, field), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise RecipeError(f"recipe {self.name!r}: {field} {value!r} is none of {choices}")
        if self.sequences < 2:
            raise RecipeError(
                f"recipe {self.name!r}: sequences must be 2 or more, not {self.sequences}"
            )

    @property
    def fits_weights(self) -> bool:
        """Whether weights are rounded by what calibration says of their inputs."""
        return self.rounding == "gptq" or self.grid != "span" or self.propagation > 0

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration changes anything at all."""
        return (
            self.fits_weights or self.k_center or bool(self.passes) or self.rotation == "measured"
        )

    def is_wide(self, layer_index: int, linear: str) -> bool:
        """Whether a linear, by its name within its layer, is to be kept at 8 bits."""
        names_of_it = (linear, layer_prefix(layer_index) + linear)
        return any(
            fnmatchcase(name, pattern) for name in names_of_it for pattern in self.wide_linears
        )

    def quantization(self, group_size: int) -> QuantizationConfig:
        """What a checkpoint made so says of itself."""
        return QuantizationConfig(
            weight_bits=self.weight_bits,
            group_size=group_size if self.weight_bits == 4 else -1,
            activation_bits=self.activation_bits,
            kv_bits=self.kv_bits,
            k_hadamard=self.k_hadamard,
            k_center=self.k_center,
            recipe=self.name,
        )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "qoq",
            rotation="measured",
            k_hadamard=True,
            k_center=True,
            passes=(RotateValues(),),
            guarded=True,
            grid="search",
            damping=0.3,
            propagation=0.25,
            sequences=16,
        ),
        Recipe(
            "qoq-paper-group",
            rotation="always",
            passes=(ReorderChannels(), SmoothAttention(0.5), SmoothOutputs(0.3, 0.7)),
        ),
        Recipe(
            "qoq-paper-channel",
            rotation="always",
            passes=(SmoothAttention(0.5), SmoothOutputs(0.1, 0.9)),
            grid="output",
            group_size=-1,
        ),
        Recipe("rtn", rounding="nearest"),
        Recipe(
            "smoothquant",
            weight_bits=8,
            kv_bits=8,
            passes=(SmoothInputs(0.85, 0.15),),
            rounding="nearest",
        ),
        Recipe("gptq", activation_bits=16, kv_bits=16),
        Recipe(
            "awq",
            activation_bits=16,
            kv_bits=16,
            passes=(SEARCHED_INPUTS, SEARCHED_OUTPUTS),
            guarded=True,
            grid="search",
            rounding="nearest",
        ),
        Recipe("quarot", rotation="always", k_hadamard=True, passes=(RotateValues(),)),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name; RecipeError if there is none."""
    if name not in RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]

"""The loader takes whole models of any precision, and names what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.formats.checkpoint import QuantizationConfig
from qserve.formats.grid import fit_grid
from qserve.formats.layout import unpack_group_scales
from qserve.formats.weight import FormatError, W8Weight
from qserve.models.config import ModelError
from qserve.models.layers import FloatLinear
from qserve.models.loader import load_decoder
from qserve.models.names import layer_prefix, layer_shapes, tensor_shapes
from qserve.testing.tiny import (
    tiny_config,
    tiny_source,
)

DOWN = "model.layers.1.mlp.down_proj"


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def holding(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def quantized(
    linear: str, bits: int, **changes: Tensor | None
) -> Callable[[dict[str, Tensor]], None]:
    """One linear quantized, then its tensors changed, or dropped where None."""

    def change(tensors: dict[str, Tensor]) -> None:
        weight = tensors.pop(f"{linear}.weight")
        grid = fit_grid(weight, 64)
        packed = W8Weight.quantize(weight) if bits == 8 else grid.pack(grid.quantize(weight))
        for suffix, tensor in {**packed.tensors(), **changes}.items():
            if tensor is not None:
                tensors[f"{linear}.{suffix}"] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("model.norm.weight"), "model.norm.weight is missing"),
        (without(f"{DOWN}.weight"), f"{DOWN}.weight is missing"),
        (without("lm_head.weight"), "lm_head.weight is missing"),
        (holding("model.layers.2.mlp.up_proj.weight", torch.zeros(1)), "layers.2.mlp.up_proj"),
        (holding(f"{DOWN}.bias", torch.zeros(128)), f"{DOWN}.bias"),
        (holding("model.norm.weight", torch.ones(64)), "model.norm.weight has shape"),
        (holding(f"{DOWN}.weight", torch.ones(128, 64)), f"{DOWN}.weight has shape"),
        (holding(f"{DOWN}.weight", torch.ones(128, 192, dtype=torch.int8)), f"{DOWN}.weight is"),
        (quantized(DOWN, 4, s2_zeros=None), f"{DOWN}.s2_zeros is missing"),
        (quantized(DOWN, 4, s1_scales=None), f"{DOWN}.s1_scales is missing"),
        (quantized(DOWN, 4, s1_szeros=torch.zeros(128)), f"{DOWN}.s1_szeros is not part"),
        (quantized(DOWN, 4, s1_scales=torch.ones(64).half()), f"{DOWN}.s1_scales"),
        (quantized(DOWN, 4, qweight=torch.zeros(128, 64).to(torch.int8)), DOWN),
        (quantized(DOWN, 4, qweight=torch.zeros(128).to(torch.int8)), f"{DOWN}.qweight"),
        (quantized(DOWN, 4, s2_scales=torch.zeros(0, 128).to(torch.int8)), f"{DOWN}.s2_scales"),
        (quantized(DOWN, 8, dequant_scale=torch.ones(3)), f"{DOWN}.dequant_scale"),
        (quantized(DOWN, 8, weight=torch.ones(128, 192)), f"{DOWN}.weight: expected an int8"),
        (quantized("model.layers.0.mlp.up_proj", 4), "layers.0.mlp.up_proj share an input"),
    ],
)
def test_unfit_tensors_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    source = tiny_source()
    change(source.tensors)
    with pytest.raises(ModelError, match=named):
        load_decoder(source, torch.float32)


def test_level_2_scales_are_read_in_either_order() -> None:
    """DeepCompressor's converter orders each block of 32 rows otherwise."""
    usual, other = tiny_source(), tiny_source()
    quantized(DOWN, 4)(usual.tensors)
    quantized(DOWN, 4)(other.tensors)
    for suffix in ("s2_scales", "s2_zeros"):
        natural = unpack_group_scales(usual.tensors[f"{DOWN}.{suffix}"]).T
        blocks = natural.reshape(-1, 4, 2, 2, 8).swapaxes(3, 4)
        other.tensors[f"{DOWN}.{suffix}"] = blocks.reshape(natural.shape).contiguous()
        assert not torch.equal(other.tensors[f"{DOWN}.{suffix}"], usual.tensors[f"{DOWN}.{suffix}"])
    ours, theirs = (
        load_decoder(source, torch.float32, activations="float").layers[1].down
        for source in (usual, other)
    )
    assert isinstance(ours, FloatLinear) and isinstance(theirs, FloatLinear)
    assert torch.equal(ours.weight, theirs.weight)


CENTER = "model.layers.1.self_attn.k_center"


@pytest.mark.parametrize(
    ("has_centers", "change", "named"),
    [
        (True, without(CENTER), f"{CENTER} is missing"),
        (True, holding(CENTER, torch.zeros(64)), f"{CENTER} has shape"),
        (True, holding(CENTER, torch.zeros(2, 64, dtype=torch.int8)), f"{CENTER} is torch.int8"),
        (False, holding(CENTER, torch.zeros(2, 64)), f"{CENTER} is not part"),
    ],
)
def test_key_centers_are_there_if_the_checkpoint_says_so(
    has_centers: bool, change: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    quantization = QuantizationConfig(k_center=has_centers).to_json()
    source = tiny_source(tiny_config(quantization_config=quantization))
    if has_centers:
        for index in range(2):
            center = torch.full((2, 64), float(index), dtype=torch.float16)
            source.tensors[f"model.layers.{index}.self_attn.k_center"] = center
        centers = load_decoder(source, torch.float32).key_centers
        assert centers is not None and centers.dtype == torch.float32
        assert torch.equal(centers, torch.arange(2.0)[:, None, None].expand(2, 2, 64))
    change(source.tensors)
    with pytest.raises(ModelError, match=named):
        load_decoder(source, torch.float32)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [({"quant_method": "awq"}, "awq"), ({"quant_method": "qoq", "qserve": {"version": 9}}, "9")],
)
def test_other_quantizations_are_refused(quantization: dict[str, Any], named: str) -> None:
    source = tiny_source(tiny_config(quantization_config=quantization))
    with pytest.raises(FormatError, match=named):
        load_decoder(source, torch.float32)


def test_redundant_tensors_are_ignored() -> None:
    source = tiny_source(tiny_config(tie_word_embeddings=True))
    source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"]
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(32)
    decoder = load_decoder(source, torch.float32)
    assert decoder.lm_head.weight is decoder.embedding


def test_layer_names_and_model_names_agree() -> None:
    config = tiny_source().config
    inner = {layer_prefix(i) + name for i in range(2) for name in layer_shapes(config)}
    outer = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(tensor_shapes(config)) == inner | outer

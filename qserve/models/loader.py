"""From a source's tensors to a decoder: each linear in the precision its tensors say.

Tensors are read one fused linear at a time, so that loading needs little more than the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qserve.formats.checkpoint import QuantizationConfig
from qserve.formats.weight import FormatError, QuantizedWeight, W4Weight, W8Weight
from qserve.kernels.gemm import prepare_weight
from qserve.models import names
from qserve.models.config import ModelConfig, ModelError
from qserve.models.decoder import Decoder, DecoderLayer, HeadNorm
from qserve.models.layers import FloatLinear, Head, Linear, QuantizedLinear, RMSNorm
from qserve.models.source import WeightSource

Activations = Literal["int8", "float"]
"""What quantized weights are multiplied with; for "float" they are dequantized at load."""


def load_decoder(
    source: WeightSource,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    activations: Activations = "int8",
) -> Decoder:
    """The whole model; ModelError or FormatError names what is missing, extra or does not fit."""
    check_names(source)
    config = source.config
    shapes = names.tensor_shapes(config) | _center_shapes(source)
    reader = _Reader(source, shapes, dtype, torch.device(device), activations)
    embedding = reader.tensor(names.EMBEDDING)
    head = embedding if config.tie_word_embeddings else reader.tensor(names.LM_HEAD)
    layers = [reader.layer(index) for index in range(config.num_layers)]
    norm = reader.norm(names.FINAL_NORM)
    return Decoder(config, embedding, layers, norm, Head.of(head), reader.key_centers())


def check_names(source: WeightSource) -> None:
    """Raise ModelError naming the first tensor that is missing or that the model does not know."""
    config, present = source.config, source.names()
    expected = _expected_names(config, present) | _center_shapes(source).keys()
    missing = expected - present
    extra = {name for name in present - expected if not _is_redundant(config, name)}
    if missing:
        raise ModelError(f"tensor {min(missing)} is missing")
    if extra:
        raise ModelError(f"tensor {min(extra)} is not part of a {config.architecture}")


def _is_redundant(config: ModelConfig, name: str) -> bool:
    """Old checkpoints carry RoPE's frequencies; tied ones may carry the embedding twice."""
    tied_head = config.tie_word_embeddings and name == names.LM_HEAD
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _expected_names(config: ModelConfig, present: set[str]) -> set[str]:
    """The float model's names, those of linears replaced by what their precision needs."""
    expected = set(names.tensor_shapes(config))
    for index in range(config.num_layers):
        for part in names.linear_shapes(config):
            linear = names.layer_prefix(index) + part
            expected.remove(f"{linear}.weight")
            expected |= {f"{linear}.{suffix}" for suffix in _weight_suffixes(present, linear)}
    return expected


def _center_shapes(source: WeightSource) -> dict[str, names.Shape]:
    """The key centers that the checkpoint says it has, by their full names."""
    config, quantization = source.config, source.quantization
    if quantization is None or not QuantizationConfig.from_json(quantization).k_center:
        return {}
    shape = (config.num_kv_heads, config.head_dim)
    return {names.layer_prefix(i) + names.KEY_CENTER: shape for i in range(config.num_layers)}


def _weight_suffixes(present: set[str], linear: str) -> tuple[str, ...]:
    """The tensors of a linear's weight, by its full name and the names that are there."""
    if f"{linear}.qweight" in present:
        if f"{linear}.s2_scales" in present:
            return ("qweight", "s1_scales", "s2_scales", "s2_zeros")
        return ("qweight", "s1_scales", "s1_szeros")
    if f"{linear}.dequant_scale" in present:
        return ("weight", "dequant_scale")
    return ("weight",)


def read_tensor(source: WeightSource, name: str) -> Tensor:
    """One tensor of an unquantized model, by its full name; ModelError if it is not what it must be."""
    tensor = source.tensor(name)
    _check(name, tensor, names.tensor_shapes(source.config)[name])
    return tensor


def read_weight(
    source: WeightSource, linear: str, device: torch.device | str = "cpu"
) -> Tensor | QuantizedWeight:
    """The weight of one unfused linear, by its full name, as it is stored, on `device`."""
    suffixes = _weight_suffixes(source.names(), linear)
    tensors = {suffix: source.tensor(f"{linear}.{suffix}").to(device) for suffix in suffixes}
    ours = "qserve" in (source.quantization or {})
    try:
        return _weight_of(tensors, linear, ours)
    except FormatError as error:
        named = str(error) if linear in str(error) else f"{linear}: {error}"
        raise ModelError(named) from error


def _weight_of(tensors: dict[str, Tensor], linear: str, ours: bool) -> Tensor | QuantizedWeight:
    """The order of foreign level-2 scales has to be found out; ours is known."""
    if "qweight" in tensors:
        weight = W4Weight(**tensors).validate(linear)
        return weight if ours else weight.in_kernel_order()
    if "dequant_scale" in tensors:
        return W8Weight(tensors["weight"], tensors["dequant_scale"].float()).validate(linear)
    return tensors["weight"]


@dataclass(frozen=True)
class _Reader:
    """Reads a source's tensors onto a device, checking them against the shapes they must have."""

    source: WeightSource
    shapes: dict[str, names.Shape]
    dtype: torch.dtype
    device: torch.device
    activations: Activations

    def tensor(self, name: str) -> Tensor:
        """One float tensor, by its full name."""
        tensor = self.source.tensor(name)
        _check(name, tensor, self.shapes[name])
        return self._place(tensor)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.tensor(name), self.source.config.rms_norm_eps)

    def key_centers(self) -> Tensor | None:
        """float32 [L, Hkv, D], if the checkpoint has them."""
        centers = [name for name in self.shapes if name.endswith(names.KEY_CENTER)]
        if not centers:
            return None
        for name in centers:
            _check(name, self.source.tensor(name), self.shapes[name])
        return torch.stack([self.source.tensor(name) for name in centers]).float().to(self.device)

    def layer(self, index: int) -> DecoderLayer:
        prefix = names.layer_prefix(index)
        return DecoderLayer(
            attention_norm=self.norm(prefix + names.ATTENTION_NORM),
            qkv=self.linear(prefix, names.QKV),
            head_norm=self._head_norm(prefix) if self.source.config.qk_norm else None,
            output=self.linear(prefix, names.OUTPUT),
            mlp_norm=self.norm(prefix + names.MLP_NORM),
            gate_up=self.linear(prefix, names.GATE_UP),
            down=self.linear(prefix, names.DOWN),
        )

    def linear(self, prefix: str, parts: tuple[str, ...]) -> Linear:
        """Linears of one layer that share an input, as one along N."""
        linears = [prefix + part for part in parts]
        weight = _concatenate(linears, [self._weight(linear) for linear in linears])
        biases = [self.tensor(f"{linear}.bias") for linear in linears if self._has_bias(linear)]
        bias = torch.cat(biases) if biases else None
        if isinstance(weight, Tensor):
            return FloatLinear(self._place(weight), bias)
        return QuantizedLinear(prepare_weight(weight, self.device), bias, self.dtype)

    def _weight(self, linear: str) -> Tensor | QuantizedWeight:
        weight = read_weight(self.source, linear, self.device)
        _check(f"{linear}.weight", weight, self.shapes[f"{linear}.weight"])
        if self.activations == "float" and not isinstance(weight, Tensor):
            return weight.dequantize()
        return weight

    def _has_bias(self, linear: str) -> bool:
        return f"{linear}.bias" in self.shapes

    def _head_norm(self, prefix: str) -> HeadNorm:
        query, key = self.norm(prefix + names.QUERY_NORM), self.norm(prefix + names.KEY_NORM)
        config = self.source.config
        return HeadNorm(query, key, config.num_heads, config.num_kv_heads)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).to(self.dtype)


def _check(name: str, tensor: Tensor | QuantizedWeight, shape: names.Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}")
    if isinstance(tensor, Tensor) and not tensor.is_floating_point():
        raise ModelError(f"tensor {name} is {tensor.dtype}, not floating-point")


def _concatenate(
    linears: Sequence[str], weights: Sequence[Tensor | QuantizedWeight]
) -> Tensor | QuantizedWeight:
    """One weight of all rows; the weights must be of one precision."""
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(tensors) == len(weights):
        return torch.cat(tensors)
    four_bit = [weight for weight in weights if isinstance(weight, W4Weight)]
    if len(four_bit) == len(weights):
        return W4Weight.concatenate(four_bit)
    eight_bit = [weight for weight in weights if isinstance(weight, W8Weight)]
    if len(eight_bit) == len(weights):
        return W8Weight.concatenate(eight_bit)
    raise ModelError(f"{' and '.join(linears)} share an input but differ in precision")

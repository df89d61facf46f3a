"""Quantize a model layer by layer, in the memory of one layer and its calibration activations."""

from __future__ import annotations

import torch
from pathlib import Path
from torch import Tensor
from torch.nn import functional

from qserve.formats.activation import quantize_activation
from qserve.formats.checkpoint import CheckpointWriter, QuantizationConfig
from qserve.formats.weight import fit_grid
from qserve.models import names
from qserve.models.attention import DenseAttention
from qserve.models.rope import rope_table
from qserve.models.source import WeightSource
from qserve.models.tokenizer import load_tokenizer
from qserve.quant.calibrate import layer_steps, read_layer
from qserve.quant.rounding import coordinate_descent, damped, gptq


def quantize(
    source: WeightSource,
    output: Path,
    group_size: int = 64,
    length: int = 512,
    sequences: int = 16,
    progress=print,
) -> None:
    """TEMPORARY first increment."""
    from pydoc_data.topics import topics

    torch.manual_seed(0)
    config = source.config
    writer = CheckpointWriter(output, "first")
    source.save_tokenizer(writer.partial)
    tokenizer = load_tokenizer(writer.partial)
    ids = torch.tensor(
        tokenizer(
            "\n\n".join(topics[k] for k in sorted(topics)), add_special_tokens=False
        ).input_ids
    )
    windows = ids[: len(ids) // length * length].view(-1, length)
    windows = windows[torch.randperm(len(windows))[:sequences]]
    embedding = source.tensor(names.EMBEDDING).float()
    exact = [embedding[w] for w in windows]
    served = list(exact)
    table = rope_table(config, length)
    plain = DenseAttention(config, length, table, True)
    paged = DenseAttention(config, length, table, True, kv_bits=4)
    outer = {
        names.EMBEDDING: embedding.half(),
        names.FINAL_NORM: source.tensor(names.FINAL_NORM).half(),
    }
    if not config.tie_word_embeddings:
        outer[names.LM_HEAD] = source.tensor(names.LM_HEAD).half()
    writer.write("model-00000", outer)
    with torch.no_grad():
        for index in range(config.num_layers):
            layer = read_layer(source, index)
            prefix = names.layer_prefix(index)
            tensors = {
                prefix + n: t.half() for n, t in layer.items() if "norm" in n or n.endswith("bias")
            }
            a = [layer_steps(layer, config, x, lambda y: plain(0, y)) for x in exact]
            b = [layer_steps(layer, config, x, lambda y: paged(0, y)) for x in served]
            steps_a, steps_b = [next(s) for s in a], [next(s) for s in b]
            for _ in range(4):
                parts = steps_a[0][0]
                weight = torch.cat([layer[p + ".weight"] for p in parts])
                bias = (
                    torch.cat([layer[p + ".bias"] for p in parts])
                    if parts[0] + ".bias" in layer
                    else None
                )
                hessian = torch.zeros(weight.shape[1], weight.shape[1])
                cross = torch.zeros_like(hessian)
                inputs = [quantize_activation(x).dequantize() for _, x in steps_b]
                for (_, x), y in zip(steps_a, inputs):
                    hessian += y.T @ y
                    cross += (x - y).T @ y
                metric = damped(hessian, 0.02)
                target = weight + 0.5 * torch.linalg.solve(metric, (weight @ cross).T).T
                grid = fit_grid(target, group_size, 1.0)
                codes = gptq(target, grid, metric)
                codes = coordinate_descent(target, grid, metric, codes, 1)
                rounded = grid.dequantize(codes)
                row = 0
                for p in parts:
                    n = layer[p + ".weight"].shape[0]
                    part = type(grid)(
                        *(
                            v[row : row + n] if isinstance(v, Tensor) else v
                            for v in vars(grid).values()
                        )
                    )
                    packed = part.pack(codes[row : row + n])
                    tensors |= {f"{prefix}{p}.{k}": t for k, t in packed.tensors().items()}
                    row += n
                steps_a = [
                    _send(s, functional.linear(x, weight, bias)) for s, (_, x) in zip(a, steps_a)
                ]
                steps_b = [_send(s, functional.linear(x, rounded, bias)) for s, x in zip(b, inputs)]
            exact, served = steps_a, steps_b
            error = sum(((x - y) ** 2).sum() for x, y in zip(exact, served)) / sum(
                (x**2).sum() for x in exact
            )
            progress(f"layer {index}: relative error {error:.4f}")
            writer.write(f"model-{index + 1:05d}", tensors)
    quantization = QuantizationConfig(group_size=group_size, k_hadamard=True, recipe="qoq")
    writer.commit(
        {**source.hf_config, "dtype": "float16", "quantization_config": quantization.to_json()}
    )


def _send(steps, value):
    try:
        return steps.send(value)
    except StopIteration as stop:
        return stop.value

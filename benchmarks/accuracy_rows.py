"""The rows of the accuracy study: variations of the recipes, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qserve.quant.recipe import RECIPES, Recipe
from qserve.quant.smooth import (
    SEARCHED_ATTENTION,
    SEARCHED_OUTPUTS,
    ReorderChannels,
    RotateValues,
    SmoothAttention,
    SmoothInputs,
    SmoothOutputs,
)

RTN, QOQ = RECIPES["rtn"], RECIPES["qoq"]
TURNED = replace(RTN, rotation="always")
FITTED = replace(RTN, rounding="gptq")
IN_DOMAIN, OWN_TEXT = "in-domain", "own"
"""Calibration texts that are not the default one."""


@dataclass(frozen=True)
class Row:
    """A recipe to measure. group_size: "auto" is the recipe's. calibration: None is the default
    text. prompts: also measure what attending to an unquantized prompt would be worth."""

    section: str
    name: str
    recipe: Recipe
    group_size: int | str = "auto"
    calibration: str | None = None
    prompts: bool = False


def methods() -> Iterator[Row]:
    for name, recipe in RECIPES.items():
        yield Row("methods", name, recipe, prompts=name == "qoq")
    yield Row("methods", "rtn, per channel", RTN, -1)
    yield Row("methods", "qoq, per channel", QOQ, -1)


def alone() -> Iterator[Row]:
    rows = {
        "rotation": TURNED,
        "key Hadamard": replace(RTN, k_hadamard=True),
        "key center": replace(RTN, k_center=True),
        "key center, then Hadamard": replace(RTN, k_hadamard=True, k_center=True),
        "rotated values": replace(RTN, passes=(RotateValues(),)),
        "grid search": replace(RTN, grid="search"),
        "grid search by output": replace(RTN, grid="output"),
        "GPTQ, damping 0.01": FITTED,
        "GPTQ, damping 0.3": replace(FITTED, damping=0.3),
        "GPTQ, damping 0.3, propagation 0.25": replace(FITTED, damping=0.3, propagation=0.25),
        "GPTAQ (propagation 1), damping 0.3": replace(FITTED, damping=0.3, propagation=1.0),
        "SmoothAttention 0.5": replace(RTN, passes=(SmoothAttention(0.5),)),
        "SmoothAttention, searched": replace(RTN, passes=(SEARCHED_ATTENTION,)),
        "smoothed outputs 0.3 / 0.7": replace(RTN, passes=(SmoothOutputs(0.3, 0.7),)),
        "smoothed outputs, searched": replace(RTN, passes=(SEARCHED_OUTPUTS,)),
        "smoothed inputs 0.5 / 0.5": replace(RTN, passes=(SmoothInputs(0.5, 0.5),)),
        "reordered channels": replace(RTN, passes=(ReorderChannels(),)),
        "down_proj at 8 bits": replace(RTN, wide_linears=("mlp.down_proj",)),
    }
    return (Row("alone", name, recipe) for name, recipe in rows.items())


def left_out() -> Iterator[Row]:
    rows = {
        "rotation": replace(QOQ, rotation="never"),
        "rotated values": replace(QOQ, passes=()),
        "key Hadamard": replace(QOQ, k_hadamard=False),
        "key center": replace(QOQ, k_center=False),
        "key center and Hadamard": replace(QOQ, k_hadamard=False, k_center=False),
        "grid search": replace(QOQ, grid="span"),
        "GPTQ": replace(QOQ, rounding="nearest"),
        "damping (0.01)": replace(QOQ, damping=0.01),
        "propagation": replace(QOQ, propagation=0.0),
    }
    return (Row("left out", name, recipe) for name, recipe in rows.items())


def changed() -> Iterator[Row]:
    rows = {
        "GPTAQ (propagation 1)": replace(QOQ, propagation=1.0),
        "propagation 0.5": replace(QOQ, propagation=0.5),
        "grid search by output": replace(QOQ, grid="output"),
        "damping 1": replace(QOQ, damping=1.0),
        "SmoothAttention, searched": replace(QOQ, passes=(*QOQ.passes, SEARCHED_ATTENTION)),
        "smoothed outputs, searched": replace(QOQ, passes=(SEARCHED_OUTPUTS,)),
        "smoothed outputs, then rotated": replace(QOQ, passes=(SEARCHED_OUTPUTS, *QOQ.passes)),
        "smoothed outputs, rotated, propagation 0.5": replace(
            QOQ, passes=(SEARCHED_OUTPUTS, *QOQ.passes), propagation=0.5
        ),
        "reordered channels": replace(QOQ, passes=(*QOQ.passes, ReorderChannels())),
        "32 windows": replace(QOQ, sequences=32),
        "64 windows": replace(QOQ, sequences=64),
        "64 windows, propagation 0.5": replace(QOQ, sequences=64, propagation=0.5),
        "16 windows of 1024": replace(QOQ, length=1024),
        "down_proj at 8 bits": replace(QOQ, wide_linears=("mlp.down_proj",)),
    }
    return (Row("changed", name, recipe) for name, recipe in rows.items())


def texts() -> Iterator[Row]:
    yield Row("calibration", "in domain", QOQ, calibration=IN_DOMAIN)
    yield Row("calibration", "in domain, 64 windows", replace(QOQ, sequences=64), "auto", IN_DOMAIN)
    yield Row("calibration", "the model's own text", QOQ, calibration=OWN_TEXT)
    yield Row("calibration", "its own, 32 windows", replace(QOQ, sequences=32), "auto", OWN_TEXT)


def dithered() -> Iterator[Row]:
    for name in ("rtn", "gptq", "awq", "quarot", "qoq-paper-group", "qoq"):
        yield Row("dithered", name, RECIPES[name])
    for name in ("rtn", "qoq-paper-channel", "qoq"):
        yield Row("dithered", f"{name}, per channel", RECIPES[name], -1)
    yield Row("dithered", "qoq, propagation 0.5", replace(QOQ, propagation=0.5))


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "methods": methods,
    "alone": alone,
    "left-out": left_out,
    "changed": changed,
    "texts": texts,
    "dithered": dithered,
}

"""Tile choice: measured winners where there are any, a sane model elsewhere."""

from __future__ import annotations

import itertools
import json

import pytest

from qserve.kernels.tiles import MEASURED, Device, Problem, Tile, choose, microseconds, tiles_for

H200 = Device("NVIDIA H200", "sm_90a", 132)
OTHER = Device("another", "sm_90a", 132)


def test_every_measured_winner_exists() -> None:
    for formats in json.loads(MEASURED.read_text()).values():
        winners = [w for shapes in formats.values() for rows in shapes.values() for w in rows]
        assert winners and all(Tile(*tile) in tiles_for("sm_90a") for _, tile in winners)


def test_measured_winners_are_taken_up_to_their_batch_size() -> None:
    winners = json.loads(MEASURED.read_text())[H200.name]["group"]["4096x14336"]
    for (most, tile), (above, _) in itertools.pairwise(winners):
        assert choose(Problem(most, 4096, 14336, "group"), H200) == Tile(*tile)
        assert choose(Problem(most + 1, 4096, 14336, "group"), H200) == choose(
            Problem(above, 4096, 14336, "group"), H200
        )


@pytest.mark.parametrize("weight_format", ["group", "channel", "int8"])
def test_the_model_follows_the_batch(weight_format: str) -> None:
    """Small tiles for few tokens, large ones for many, never a tile many times too wide."""
    few = choose(Problem(1, 4096, 4096, weight_format), OTHER)
    many = choose(Problem(4096, 4096, 4096, weight_format), OTHER)
    assert (few.kind, few.tokens, many.kind) == ("small", 16, "large")
    for tokens in (1, 16, 64, 300, 5000):
        problem = Problem(tokens, 12288, 4096, weight_format)
        assert choose(problem, OTHER).tokens <= 16 * tokens


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_more_work_takes_no_less_time(arch: str) -> None:
    for tile in tiles_for(arch):
        times = [
            microseconds(tile, Problem(tokens, rows, columns, "group"), OTHER)
            for tokens, rows, columns in ((16, 4096, 4096), (512, 4096, 4096), (512, 8192, 8192))
        ]
        assert times == sorted(times)

"""`loraplex adapters combine`, as typed in a shell."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loraplex_adapters import format as adapter_format
from loraplex_server.cli import app
from tests.adapters.making import random_weights, save_random, tiny_base

runner = CliRunner()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return save_random(tmp_path / "one", seed=1, rank=3), save_random(tmp_path / "two", seed=2, rank=2)


def combine(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(app, ["adapters", "combine", *arguments])
    return result.exit_code, result.output


def test_weighted_folders_become_one_that_can_be_served(folders: tuple[Path, Path], tmp_path: Path) -> None:
    code, output = combine(f"{folders[0]}:0.5", f"{folders[1]}:-2", "--out", str(tmp_path / "both"))
    assert code == 0, output
    assert "exact sum" in output
    made = adapter_format.read(tmp_path / "both", tiny_base())
    one, two = random_weights(1, rank=3), random_weights(2, rank=2)
    for module, factors in made.factors.items():
        expected = sum(
            weight * w.factors[module].scaling * w.factors[module].b @ w.factors[module].a
            for weight, w in ((0.5, one), (-2.0, two))
        )
        torch.testing.assert_close(factors.scaling * factors.b @ factors.a, expected, rtol=1e-4, atol=1e-4)


def test_an_approximate_method_says_how_far_off_it_is(folders: tuple[Path, Path], tmp_path: Path) -> None:
    code, output = combine(*map(str, folders), "--method", "svd", "--rank", "2", "--out", str(tmp_path / "cut"))
    assert code == 0, output
    assert "approximation" in output
    assert adapter_format.read(tmp_path / "cut", tiny_base()).max_rank == 2


@pytest.mark.parametrize(
    "arguments",
    [["{one}:heavy"], ["{one}", "--rank", "2"], ["{missing}"], ["{one}", "--density", "0", "--method", "ties"]],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    arguments: list[str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    filled = [text.format(one=folders[0], missing=tmp_path / "missing") for text in arguments]
    code, output = combine(*filled, "--out", str(tmp_path / "out"))
    assert code == 1
    assert output.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_overwritten(folders: tuple[Path, Path]) -> None:
    code, output = combine(str(folders[0]), "--out", str(folders[1]))
    assert code == 1
    assert "exists already" in output

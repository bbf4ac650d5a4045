"""The options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.step import Attention, Padding
from esm_efficient.recipes import RECIPES, Precision, get_recipe


def _check_recipes(names: str | list[str]) -> str | list[str]:
    try:
        for name in [names] if isinstance(names, str) else names:
            get_recipe(name)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    return names


ModelOption = Annotated[str, typer.Option("--model", help="An ESM-2 size such as 650M, a model id or a folder.")]
DeviceOption = Annotated[str, typer.Option("--device", help="A GPU or an instance type.")]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="Tokens per sequence, special tokens included.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Number format of a training step.")]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="Optimizer of the estimate.")]
AttentionOption = Annotated[Attention, typer.Option("--attention", help="Attention implementation of transformers.")]
PaddingOption = Annotated[Padding | None, typer.Option("--padding", help="Layout of a batch; default: the recipe's.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to this file.")]

_NAMES = f"one of {', '.join(RECIPES)}"
RecipeOption = Annotated[str, typer.Option("--recipe", callback=_check_recipes, help=f"Training method: {_NAMES}.")]
RecipesOption = Annotated[
    list[str],
    typer.Option("--recipe", callback=_check_recipes, help=f"Training method to try, {_NAMES}; can be repeated."),
]

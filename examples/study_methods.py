"""The methods that ``compare_methods.py`` compares."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any, get_args

from transformers import TrainerCallback

from esm_efficient import RECIPES, Recipe
from esm_efficient.recipes import select_layers
from esm_efficient.tasks import Pooling
from esm_efficient.trunk.layer_states import Reading

SETTING_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Recipe) if f.name not in ("name", "description")}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the study.

    Attributes:
        name: name in the results file.
        recipe: how it trains; None for a method that trains no network.
        epochs: passes over the training proteins.
        truncated: number of layers that are kept before training; 0 for all.
        probed: the layer and the reading of a linear probe; None for another method.
        options: further options of `finetune`.
        rates: as `GroupRates`.
        calibrated: whether validation proteins fit a temperature, and the calibration before and after it is measured.
    """

    name: str
    recipe: Recipe | None = None
    epochs: int = 0
    truncated: int = 0
    probed: tuple[int, Reading] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    calibrated: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the result, besides data, model and seed: what differs from the defaults of `Recipe`."""
        if self.recipe is None:
            return {}
        values = dataclasses.asdict(self.recipe)
        changed = {name: values[name] for name, usual in SETTING_DEFAULTS.items() if values[name] != usual}
        given = {"options": dict(self.options), "rates": dict(self.rates), "calibrated": self.calibrated}
        changed |= {"epochs": self.epochs, "truncated": self.truncated} | {k: v for k, v in given.items() if v}
        return json.loads(json.dumps(changed))  # tuples become lists, as in the file


class GroupRates(TrainerCallback):
    """Train some parameters at a multiple of the learning rate.

    LoRA+ (Hayou et al. 2024) is a higher rate for the matrices B.

    Args:
        rates: the multiple, by a shell pattern of the parameters' names.
    """

    def __init__(self, rates: Mapping[str, float]) -> None:
        self.rates = rates

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        for pattern, rate in self.rates.items():
            moved = 0
            for group, shape in list(zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True)):
                chosen = [p for p in group["params"] if fnmatch(names[id(p)], pattern)]
                if not chosen:
                    continue
                group["params"] = [p for p in group["params"] if not fnmatch(names[id(p)], pattern)]
                rates = {key: rate * group[key] for key in ("lr", "initial_lr")}
                optimizer.add_param_group({**group, "params": chosen, **rates})
                scheduler.base_lrs.append(rates["initial_lr"])
                scheduler.lr_lambdas.append(shape)
                moved += len(chosen)
            if not moved:
                raise ValueError(f"no parameter that trains is named like {pattern!r}")


def list_methods(layers: int) -> list[Method]:
    """Return all methods for an encoder with this number of layers."""
    methods = [Method("majority"), Method("composition")]
    for reading, layer in itertools.product(get_args(Reading), range(layers + 1)):
        methods.append(Method(f"probe{layer}-{reading}", probed=(layer, reading)))
    methods += [Method("tutorial-base"), Method("tutorial-all")]
    lora, base, frozen = RECIPES["lora"], RECIPES["base"], RECIPES["frozen"]
    depths = sorted({len(select_layers(share, layers)) for share in ("top-1/6", "top-1/3", "top-1/2", "all")})
    for pooling, epochs in itertools.product(get_args(Pooling), (1, 3)):
        end = f"{pooling}-e{epochs}"
        methods.append(Method(f"frozen-{end}", frozen.replace(pooling=pooling), epochs))
        for depth in depths:
            recipe = lora.replace(layers=f"top-{depth}", cache=depth < layers, pooling=pooling)
            methods.append(Method(f"lora-top{depth}-{end}", recipe, epochs))
        methods.append(Method(f"full-{end}", base.replace(pooling=pooling), epochs))
        whole = lora.replace(pooling=pooling)
        methods += [Method(f"truncated{kept}-lora-{end}", whole, epochs, kept) for kept in range(1, layers)]
    methods += [Method(f"frozen-{pooling}-e10", frozen.replace(pooling=pooling), 10) for pooling in get_args(Pooling)]
    methods += [Method(f"{name}-first-e1", RECIPES[name], 1) for name in ("ga", "gc", "all")]
    methods.append(Method("lora-ga-first-e1", lora.replace(micro_batch=2, accumulation=4), 1))
    methods.append(Method("lora-gc-first-e1", lora.replace(gradient_checkpointing=True), 1))
    methods.append(Method("top-calibrated-e1", RECIPES["top"], 1, calibrated=True))
    return methods + tuning_methods(layers)


def tuning_methods(layers: int) -> list[Method]:
    """Return the recipe `lora` on the top third of the layers, with one setting changed at a time."""
    third = len(select_layers("top-1/3", layers))
    usual = RECIPES["lora"].replace(layers=f"top-{third}", cache=third < layers)
    recipes = {
        "rate-third": usual.replace(learning_rate=usual.learning_rate * 0.3),
        "rate-triple": usual.replace(learning_rate=usual.learning_rate * 3),
        "batch-16": usual.replace(micro_batch=16),
        "batch-32": usual.replace(micro_batch=32),
        "rank-2": usual.replace(r=2),
        "rank-32": usual.replace(r=32),
        "qkv": usual.replace(preset="qkv"),
    }
    options: dict[str, dict[str, Any]] = {
        "alpha-half": {"adapter_options": {"lora_alpha": 8}},
        "alpha-double": {"adapter_options": {"lora_alpha": 32}},
        "dropout": {"adapter_options": {"lora_dropout": 0.1}},
        "rslora": {"adapter_options": {"use_rslora": True}},
        "dora": {"adapter_options": {"use_dora": True}},
        "eva": {"adapter_options": {"init_lora_weights": "eva"}},
        "warm-up": {"warmup_steps": 0.1},
        "cosine": {"lr_scheduler_type": "cosine"},
        "weights-none": {"class_weights": None},
    }
    rates = {
        "head-slow": {"*classifier*": 0.1},
        "head-fast": {"*classifier*": 10.0},
        "lora-plus": {"*lora_B*": 4.0},
    }
    return [
        *(Method(f"tune-{name}", recipe, 1) for name, recipe in recipes.items()),
        *(Method(f"tune-{name}", usual, 1, options=changed) for name, changed in options.items()),
        *(Method(f"tune-{name}", usual, 1, rates=changed) for name, changed in rates.items()),
    ]


def quick_rows(layers: int) -> list[str]:
    """Return the methods of ``--quick`` for an encoder with this number of layers."""
    third = len(select_layers("top-1/3", layers))
    return ["majority", "composition", "probe*", "frozen-attention-e3", f"lora-top{third}-first-e3", "full-first-e1"]

"""The model card of a trained model: what it predicts, from which data, how well, at which cost."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import EvalResult, ModelCardData

from esm_efficient import __version__
from esm_efficient.heads import model_class
from esm_efficient.published import size_of
from esm_efficient.reporting import escape_markdown, format_markdown, one_line
from esm_efficient.tasks import Pooling, Task

if TYPE_CHECKING:
    from esm_efficient.reporting.description import DataDescription
    from esm_efficient.training.result import FinetuneResult

CARD = "README.md"
"""The file of a model card, which the Hub reads."""

Holds = Literal["model", "adapter", "merged"]
"""What a folder holds: a whole model, an adapter, or a model with which an adapter was merged."""

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate")

_ESM2_LICENCE = "mit"
"""The licence of the published ESM-2 models, as their cards on the Hub state it."""

_CITATIONS = {
    "ESM-2": """@article{lin2023evolutionary,
  title = {Evolutionary-scale prediction of atomic-level protein structure with a language model},
  author = {Lin, Zeming and Akin, Halil and Rao, Roshan and Hie, Brian and others},
  journal = {Science}, volume = {379}, number = {6637}, pages = {1123--1130}, year = {2023}
}""",
    "LoRA": """@inproceedings{hu2022lora,
  title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and others},
  booktitle = {International Conference on Learning Representations}, year = {2022}
}""",
}


@dataclass(frozen=True)
class CardFacts:
    """What is known of a trained model, whatever trained it.

    Attributes:
        task: its task.
        pooling: what its head reads.
        metrics: its finite metrics; empty if it was not evaluated.
        evaluated_on: the split of the metrics.
        thresholds: label name -> probability from which the label is positive, or None.
        settings: how it was trained, by name.
        is_truncated: whether the base model has more layers than the model.
        intervals: 95 % interval of metrics.
        data: description of the splits, or None.
    """

    task: Task
    pooling: Pooling
    metrics: Mapping[str, float]
    evaluated_on: str
    thresholds: Mapping[str, float] | None
    settings: Mapping[str, str]
    is_truncated: bool = False
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    data: DataDescription | None = None


def run_settings(result: FinetuneResult) -> dict[str, str]:
    """Return how a run of `finetune` trained, and what it cost, by name."""
    settings = {"recipe": result.recipe}
    if result.trained_layers:  # empty if the run resumed after its last step
        settings["trained encoder layers"] = result.layers_in_words
    states = {"time of the cached states": f"{result.states_seconds:,.0f} s"} if result.states_seconds else {}
    return settings | {
        "optimizer steps": result.steps_in_words,
        "seed": str(result.seed),
        f"time of the {result.loop_in_words}": f"{result.seconds:,.0f} s",
        **states,
        "peak memory": result.peak_memory_in_words,
    }


def model_card(facts: CardFacts, base_model: str, *, holds: Holds, dataset: str = "", description: str = "") -> str:
    """Return a model card with metadata for the Hub.

    Args:
        facts: what is known of the model.
        base_model: Hub name or folder of the model that was fine-tuned; of a folder, the card has its last part only.
        holds: what the folder of the card holds.
        dataset: name of the data.
        description: a paragraph in Markdown.
    """
    base = public_name(base_model)
    title = f"{one_line(Path(base).name)}, fine-tuned: {one_line(facts.task.describe())}"
    is_esm2 = not Path(base_model).is_absolute() and size_of(base_model) is not None  # not anyone's folder of that name
    metadata = _metadata(facts, title, base, dataset, holds, is_esm2=is_esm2)
    thresholds = "".join(
        f"\n- {escape_markdown(name)}: {value:.3f}" for name, value in (facts.thresholds or {}).items()
    )
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    settings = {"base model": base, **facts.settings, "esm_efficient": __version__, **versions}
    licence = "The base model has the MIT licence." if is_esm2 else "The licence of the base model applies."
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {escape_markdown(title)}",
        description,
        f"It predicts {escape_markdown(facts.task.describe())}.",
        f"A label is positive from this probability on:\n{thresholds}" if thresholds else "",
        _metrics(facts, dataset),
        _data(facts, dataset),
        "## Training\n\n" + format_markdown(list(settings.items()), ("setting", "value")),
        _usage(facts, holds),
        f"## Licence\n\n{licence} The licence of the training data may restrict the use of this model too. Predictions "
        "are estimates: they do not replace an experiment.",
        _citation(is_esm2, holds),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def public_name(base_model: str) -> str:
    """Return the name of a base model to publish: of a folder of this machine, its last part."""
    return Path(base_model).name if Path(base_model).is_absolute() else base_model


def _metrics(facts: CardFacts, dataset: str) -> str:
    if not facts.metrics:
        return ""
    where = f"the split {escape_markdown(facts.evaluated_on)}" + (f" of {escape_markdown(dataset)}" if dataset else "")
    rows = [
        (name, f"{value:.4f}", "{:.4f} to {:.4f}".format(*facts.intervals[name]) if name in facts.intervals else "-")
        for name, value in facts.metrics.items()
    ]
    note = ""
    if facts.intervals:
        note = (
            "\n\nThe intervals are those of a bootstrap over the sequences. They do not include the differences "
            "between seeds."
        )
    return f"## Metrics\n\nOn {where}:\n\n{format_markdown(rows, ('metric', 'value', '95 % interval'))}{note}"


def _data(facts: CardFacts, dataset: str) -> str:
    if facts.data is None:
        return ""
    named = f"{escape_markdown(dataset)}\n\n" if dataset else ""
    return f"## Data\n\n{named}" + format_markdown(facts.data.rows(), ("", *facts.data.splits))


def _metadata(facts: CardFacts, title: str, base: str, dataset: str, holds: Holds, *, is_esm2: bool) -> ModelCardData:
    of_tokens = facts.task.head == "token-classification"
    pipeline = "token-classification" if of_tokens else "text-classification"
    name = one_line(dataset) or "unnamed"
    # A head that transformers does not have: its Auto classes would build another one.
    library = "esm_efficient" if facts.pooling != "first" else "peft" if holds == "adapter" else "transformers"
    return ModelCardData(
        model_name=title,
        base_model=base if "/" in base else None,
        license=_ESM2_LICENCE if is_esm2 else None,
        library_name=library,
        pipeline_tag=pipeline,
        tags=["esm2", "protein", "biology", *(["lora"] if holds != "model" else [])],
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type=name,
                dataset_name=name,
                dataset_split=facts.evaluated_on,
                metric_type=one_line(metric),
                metric_value=round(value, 6),
            )
            for metric, value in facts.metrics.items()
        ],
    )


def _usage(facts: CardFacts, holds: Holds) -> str:
    own = (
        "With `esm_efficient`, which checks sequences, computes without padding and applies thresholds:\n\n```python\n"
        "from esm_efficient import Predictor\n\n"
        'Predictor.load("FOLDER").predict(["MKTAYIAKQR"])\n```'
    )
    kind = model_class(facts.task.head, facts.pooling)
    name, library = kind.__name__, kind.__module__.split(".")[0]
    if holds == "adapter" and facts.is_truncated:  # transformers would load the whole base model
        return f"## Usage\n\n{own}"
    if library != "transformers":
        if holds == "adapter":
            return f"## Usage\n\n{own}"
        plain = (
            f"from {library} import {name}\nfrom transformers import AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
            f'model = {name}.from_pretrained("FOLDER")\n'
            'logits = model(**tokenizer("MKTAYIAKQR", return_tensors="pt")).logits'
        )
        return f"## Usage\n\n{own}\n\nWithout its checks:\n\n```python\n{plain}\n```"
    of_tokens = facts.task.head == "token-classification"
    task = "token-classification" if of_tokens else "text-classification"
    # Without these, the pipeline reads more of a long sequence than the training did, and gives one label of several.
    kind, numbers = facts.task.kind, len(facts.task.names)
    several = kind == "multi_label_classification" or (kind == "regression" and numbers > 1)
    options = ", top_k=None" if several else ""
    called = '("MKTAYIAKQR")' if of_tokens else f'("MKTAYIAKQR", truncation=True{options})'
    plain = f'from transformers import pipeline\n\npipeline("{task}", "FOLDER"){called}'
    if holds == "adapter":
        # The folder of an adapter must not have a config.json: transformers would take it for a whole model. The
        # pipeline of a folder's name reads the config of the base model, which has other labels.
        auto = "AutoModelForTokenClassification" if of_tokens else "AutoModelForSequenceClassification"
        plain = (
            f"from transformers import AutoConfig, AutoTokenizer, {auto}, pipeline\n\n"
            'config = AutoConfig.from_pretrained("FOLDER/base_config")  # it has the names of the labels\n'
            f'model = {auto}.from_pretrained("FOLDER", config=config)\n'
            f'pipeline("{task}", model, tokenizer=AutoTokenizer.from_pretrained("FOLDER")){called}'
        )
    return f"## Usage\n\n{own}\n\nWith transformers alone:\n\n```python\n{plain}\n```"


def _citation(is_esm2: bool, holds: Holds) -> str:
    wanted = [*(["ESM-2"] if is_esm2 else []), *(["LoRA"] if holds != "model" else [])]
    return "## Citation\n\n" + "\n\n".join(f"```bibtex\n{_CITATIONS[name]}\n```" for name in wanted) if wanted else ""

"""Heads for sequence-level tasks that read all residues: their mean, or a mean with learned weights.

transformers' own head reads the first token alone. What a head reads is named by ``config.classifier_pooling``, as in
ModernBERT of transformers: ``"first"`` (or no such field), ``"mean"`` or ``"attention"``.

Residues are told from special tokens by their place: the first and the last token of a sequence are ``<cls>`` and
``<eos>``, and every token between them is a residue. So the cached states of a sequence, which have no token ids, are
read as its ids are. Sequences must therefore have both special tokens, as every tokenizer of ESM adds them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import EsmConfig, EsmModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.esm.modeling_esm import EsmPreTrainedModel
from transformers.utils import can_return_tuple

from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import SPECIAL_TOKENS, Head, Pooling, auto_class, base_model_of, pooling_of, set_pooling

_POOLED = "_pooling"
"""The end of the name of a head's layers, after the pooling."""
_SCORE_SHARE = 4
"""The network that scores a residue is a fourth as wide as the states."""


class PooledClassificationHead(nn.Module):
    """Reads a weighted mean of the states of a sequence's residues; two linear layers turn it into logits.

    With ``"mean"`` each residue has the same weight. With ``"attention"`` a small network gives each residue a score
    from its state, and the weights are the softmax of the scores over the residues of the sequence. So does the
    attention pooling of DeepLoc 2 (Thumuluri et al. 2022, "DeepLoc 2.0: multi-label subcellular localization prediction
    using protein language models"). Its network is a projection and one vector; DeepLoc 2 also smooths the scores over
    neighbouring residues and trains them on known sorting signals, which this head does not.

    The names of the weights contain the pooling (``classifier.mean_pooling.hidden.weight``), so that no head is loaded
    as another one, or as ``EsmClassificationHead``.

    Args:
        config: the model's config, with ``classifier_pooling``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        pooling = pooling_of(config)
        layers: dict[str, nn.Module] = {
            "hidden": nn.Linear(width, width),
            "output": nn.Linear(width, config.num_labels),
        }
        if pooling == "attention":
            inner = max(1, width // _SCORE_SHARE)
            # The softmax would cancel a bias after the last layer. peft would take a layer named "score" for a head.
            layers["scorer"] = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, 1, bias=False))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self._name = pooling + _POOLED
        self.add_module(self._name, nn.ModuleDict(layers))

    def forward(self, states: Tensor, residues: Tensor) -> Tensor:
        """Return the logits.

        Args:
            states: of shape (rows, columns, width).
            residues: bool of shape (rows, columns), true for the residues.

        Returns:
            The logits, of shape (rows, labels).
        """
        layers: Any = self.get_submodule(self._name)
        weights = self.residue_weights(states, residues)
        pooled = (states * weights.unsqueeze(-1)).sum(1).to(states.dtype)
        hidden = torch.tanh(layers["hidden"](self.dropout(pooled)))
        return layers["output"](self.dropout(hidden))

    def residue_weights(self, states: Tensor, residues: Tensor) -> Tensor:
        """Return the weight of each residue; the arguments are those of `forward`.

        Returns:
            Weights that sum to 1 per row and are 0 elsewhere, of shape (rows, columns), at least in float32.
        """
        layers: Any = self.get_submodule(self._name)
        dtype = torch.promote_types(states.dtype, torch.float32)
        if "scorer" not in layers:
            return residues.to(dtype) / residues.sum(1, keepdim=True).clamp(min=1)
        scores = layers["scorer"](states).squeeze(-1).to(dtype)
        # A row without any token has zeros and no NaN.
        return scores.masked_fill(~residues, torch.finfo(dtype).min).softmax(1) * residues


class PooledEsmForSequenceClassification(EsmPreTrainedModel):
    """ESM-2 with a head that reads all residues, in the place of transformers' ``EsmForSequenceClassification``.

    It is an ordinary model of transformers: ``from_pretrained``, ``save_pretrained``, Trainer and peft take it as any
    other. The Auto classes do not know it: they build a first-token head with new weights from such a folder, and warn.
    `Predictor.load` builds the right class.

    Args:
        config: the model's config.
        classifier_pooling: ``"mean"`` or ``"attention"``; None for what the config says.

    Raises:
        ConfigurationError: it is neither, or the config is not that of an ESM-2 model.

    Example:
        >>> from esm_efficient import PooledEsmForSequenceClassification, demo_model_path
        >>> model = PooledEsmForSequenceClassification.from_pretrained(demo_model_path(), classifier_pooling="mean")
        >>> model.config.classifier_pooling
        'mean'
    """

    def __init__(self, config: EsmConfig, *, classifier_pooling: Pooling | None = None) -> None:
        if not isinstance(config, EsmConfig):
            raise ConfigurationError(
                f"got a {type(config).__name__}: heads that pool residues are for ESM-2 of transformers alone. Use "
                "pooling='first'"
            )
        super().__init__(config)
        if classifier_pooling is not None:
            set_pooling(config, classifier_pooling)
        if pooling_of(config) == "first":
            raise ConfigurationError(
                "classifier_pooling is 'first' or not in the config: expected 'mean' or 'attention'. Give it to "
                "from_pretrained, or use EsmForSequenceClassification, whose head reads the first token"
            )
        self.num_labels = config.num_labels
        self.esm = EsmModel(config, add_pooling_layer=False)
        self.classifier = PooledClassificationHead(config)
        self.post_init()

    @classmethod
    def from_config(
        cls, config: EsmConfig, *, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32
    ) -> PooledEsmForSequenceClassification:
        """Return a model with new weights, as the Auto classes of transformers do."""
        model: Any = cls(config)
        model.to(dtype)
        model.set_attn_implementation(attn_implementation)
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify sequences.

        Args:
            input_ids: token ids, int64 of shape (rows, columns); each sequence begins with ``<cls>`` and ends with
                ``<eos>``. Sequences of fewer than three tokens have no residues: all their tokens are read.
            attention_mask: 1 for tokens and 0 for padding, which may be on either side, of the same shape. Without it,
                the head still leaves padding ids out, but the encoder does not, as everywhere in transformers.
            position_ids: as in ``EsmModel``.
            inputs_embeds: float of shape (rows, columns, width), in place of `input_ids`.
            labels: as in ``EsmForSequenceClassification``.
            **kwargs: as in ``EsmModel``.
        """
        residues = self._residues(input_ids, attention_mask, inputs_embeds)
        outputs = self.esm(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(outputs[0], residues)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def residue_weights(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the weight of each residue in the mean that the head reads; the arguments are those of `forward`.

        Returns:
            Weights of shape (rows, columns) that sum to 1 per sequence; 0 for special tokens and padding.
        """
        residues = self._residues(input_ids, attention_mask, inputs_embeds)
        outputs = self.esm(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return self.classifier.residue_weights(outputs[0], residues)

    def _residues(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Return which tokens are residues, bool of shape (rows, columns)."""
        config: Any = self.config
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (attention_mask is not None and attention_mask.dim() != 2):
            shape = None if attention_mask is None else tuple(attention_mask.shape)
            raise ConfigurationError(
                f"got {'no tokens' if given is None else 'tokens'} and an attention mask of shape {shape}: expected "
                "input_ids or inputs_embeds, and a mask of shape (rows, columns) or None, because the head must know "
                "which tokens are padding"
            )
        if attention_mask is not None:
            tokens = attention_mask.bool().expand(given.shape[:2])
        elif input_ids is not None:
            tokens = input_ids.ne(config.pad_token_id)
        else:
            tokens = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        return find_residues(tokens)


def find_residues(tokens: Tensor) -> Tensor:
    """Return which tokens are residues: all but the first and the last token of each sequence.

    A sequence of fewer than three tokens has no residues. All its tokens are returned then, so that the mean exists; so
    a pooled state in the place of a sequence is read as it is.

    Args:
        tokens: bool of shape (rows, columns), false for padding.

    Example:
        >>> find_residues(torch.tensor([[True, True, True, True, False], [False, True, True, True, True]]))
        tensor([[False,  True,  True, False, False],
                [False, False,  True,  True, False]])
    """
    place = tokens.cumsum(1)
    count = place[:, -1:]
    return tokens & ((count <= SPECIAL_TOKENS) | ((place > 1) & (place < count)))  # onnxruntime has no `where` of bools


def model_class(head: Head, pooling: Pooling = "first") -> Any:
    """Return the class that loads or builds a model: one of transformers' Auto classes, or the class of pooled heads.

    Args:
        head: the kind of head.
        pooling: what the head reads.

    Raises:
        ConfigurationError: a head for residues is to pool them.
    """
    if pooling == "first":
        return auto_class(head)
    if head != "sequence-classification":
        raise ConfigurationError(
            f"pooling={pooling!r} with a {head} head, which reads each token by itself: expected pooling='first'"
        )
    return PooledEsmForSequenceClassification


def pooling_of_model(model: Any) -> Pooling:
    """Return what the head of a model reads, by the class of the model, with or without adapters."""
    base = base_model_of(model)
    return pooling_of(base.config) if isinstance(base, PooledEsmForSequenceClassification) else "first"


def pooling_of_weights(names: Iterable[str]) -> Pooling:
    """Return what the head reads to which weights belong, by their names.

    Example:
        >>> pooling_of_weights(["base_model.model.classifier.mean_pooling.hidden.weight"])
        'mean'
    """
    poolings: dict[str, Pooling] = {pooling + _POOLED: pooling for pooling in get_args(Pooling)}
    return next((poolings[part] for name in names for part in name.split(".") if part in poolings), "first")

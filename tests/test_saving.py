"""A saved model computes the same numbers in every supported version of transformers.

The tests across two versions need an interpreter with another version in ESM_EFFICIENT_OTHER_PYTHON. .ci/run sets it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import from_environment, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification, EsmModel

import esm_efficient
from esm_efficient.saving import load_pretrained, portable_saving

LAYERS = 2
PER_LAYER = [f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in range(LAYERS)]
SPELLINGS = {
    "one per layer": PER_LAYER,
    "one per model": ["rotary_embeddings.inv_freq"],
    "a star for the layers": ["encoder.layer.*.attention.self.rotary_embeddings.inv_freq"],
}
HEADS = [EsmForSequenceClassification, EsmForTokenClassification, EsmForMaskedLM, EsmModel]
IDS = torch.randint(4, 24, (1, 900), generator=torch.Generator().manual_seed(0))


def rounded(model):
    """Round the rotary frequencies of a model to bfloat16, as some checkpoints have them."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    return model.eval()


@torch.no_grad()
def outputs(model):
    return model.eval()(IDS)[0]


def keys(path):
    with safe_open(path, "pt") as handle:
        return set(handle.keys())


@pytest.mark.parametrize("head", HEADS)
def test_weights_are_saved_under_names_that_every_version_reads(tmp_path, head):
    model = make_model(head)
    with portable_saving(model):
        model.save_pretrained(tmp_path)
    prefix = "" if head is EsmModel else "esm."
    own = {name for name in model.state_dict() if "rotary" not in name and name != "lm_head.decoder.weight"}
    names = keys(tmp_path / "model.safetensors") - {"lm_head.decoder.weight"}
    assert names == own | {prefix + name for name in PER_LAYER}
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("shards", ["50GB", "3KB"])
def test_a_saved_model_loads_in_plain_transformers_and_in_a_state_dict(tmp_path, shards):
    model = rounded(make_model())
    with portable_saving(model):
        model.save_pretrained(tmp_path, max_shard_size=shards)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "3KB")
    loaded, info = EsmForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(loaded), outputs(model))
    # A Trainer resumes this way.
    resumed = make_model(seed=1)
    found = resumed.load_state_dict({k: v for path in files for k, v in load_file(path).items()}, strict=False)
    assert not found.missing_keys
    assert torch.equal(outputs(resumed), outputs(model))


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_frequencies_are_loaded_under_every_name(tmp_path, spelling, prefixed):
    model = rounded(make_model())
    with portable_saving(model):
        model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    frequencies, *_ = [weights.pop(f"esm.{name}") for name in PER_LAYER]
    weights |= {f"esm.{name}": frequencies.clone() for name in SPELLINGS[spelling]}
    if not prefixed:  # a backbone without a head
        weights = {name.removeprefix("esm."): value for name, value in weights.items() if name.startswith("esm.")}
    save_file(weights, path, metadata={"format": "pt"})
    loaded, missing, _ = load_pretrained(EsmForSequenceClassification, tmp_path)
    assert missing == ([] if prefixed else [n for n in sorted(model.state_dict()) if n.startswith("classifier.")])
    found = [buffer for name, buffer in loaded.named_buffers() if name.endswith("inv_freq")]
    assert found
    assert all(torch.equal(buffer, frequencies) for buffer in found)


def test_a_checkpoint_without_frequencies_keeps_the_exact_ones(tmp_path):
    model = make_model()
    with portable_saving(model):
        model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "inv_freq" not in k}, path, metadata={"format": "pt"})
    loaded, missing, _ = load_pretrained(EsmForSequenceClassification, tmp_path)
    assert missing == []
    assert torch.equal(outputs(loaded), outputs(model))


# --- two versions ---

OTHER = """
import json, sys, torch, transformers, esm_efficient
from pathlib import Path
from safetensors.torch import save_file
from transformers import EsmForSequenceClassification
from esm_efficient.saving import load_pretrained, portable_saving

root = Path(sys.argv[1])
ids = torch.load(root / "ids.pt")
out = {}
with torch.no_grad():
    for name in ("portable", "plain"):
        here, _ = EsmForSequenceClassification.from_pretrained(root / name, output_loading_info=True)
        out[name] = here.eval()(ids)[0]
        out[name + " with the library"] = load_pretrained(EsmForSequenceClassification, root / name)[0].eval()(ids)[0]
model = load_pretrained(EsmForSequenceClassification, root / "portable")[0]
with portable_saving(model):
    model.save_pretrained(root / "portable back")
model.save_pretrained(root / "plain back")
save_file(out, root / "out.safetensors")
print(json.dumps([transformers.__version__, esm_efficient.__file__]))
"""


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory):
    """Outputs of one model in this version and in the other one, and folders that the other one wrote."""
    python = from_environment("ESM_EFFICIENT_OTHER_PYTHON")
    root = tmp_path_factory.mktemp("versions")
    model = rounded(make_model())
    with portable_saving(model):
        model.save_pretrained(root / "portable")
    model.save_pretrained(root / "plain")
    torch.save(IDS, root / "ids.pt")
    done = subprocess.run(
        [str(python), "-c", OTHER, str(root)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(Path(esm_efficient.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version, file = json.loads(done.stdout.splitlines()[-1])
    assert version != transformers.__version__
    assert file == esm_efficient.__file__
    return outputs(model), load_file(root / "out.safetensors"), root


@pytest.mark.parametrize("way", ["portable", "portable with the library", "plain with the library"])
def test_the_other_version_computes_the_same(two_versions, way):
    expected, found, _ = two_versions
    torch.testing.assert_close(found[way], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["portable back", "plain back"])
def test_what_the_other_version_wrote_computes_the_same_here(two_versions, name):
    expected, _, root = two_versions
    model, missing, _ = load_pretrained(EsmForSequenceClassification, root / name)
    assert missing == []
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-6)
    if name == "portable back":
        plain = EsmForSequenceClassification.from_pretrained(root / name)
        torch.testing.assert_close(outputs(plain), expected, rtol=0, atol=1e-6)


def test_no_report_of_a_new_head_is_logged_and_other_messages_are(tmp_path, caplog):
    make_model(EsmModel).save_pretrained(tmp_path)
    caplog.clear()
    EsmForSequenceClassification.from_pretrained(tmp_path)
    assert "LOAD REPORT" in caplog.text
    caplog.clear()
    assert load_pretrained(EsmForSequenceClassification, tmp_path).missing
    assert "LOAD REPORT" not in caplog.text
    logging.getLogger("transformers.modeling_utils").warning("another LOAD REPORT")
    assert "another" in caplog.text

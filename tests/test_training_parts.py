"""Layers, parameter groups, schedules, models by reference, and files that survive a kill."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import resource

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from overnight.errors import UserError
from overnight.settings import Training
from overnight.training import files
from overnight.training.device import choose_precision, is_out_of_memory
from overnight.training.layers import depths, freeze
from overnight.training.models import quiet, resolve_base
from overnight.training.optimizers import make_optimizer, parameter_groups, schedule, set_rates

SMALL = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16},
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 16},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16},
    "electra": {
        "hidden_size": 16,
        "embedding_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    "modernbert": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16},
    "deberta-v2": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16},
}


def small(family: str):
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=50, num_labels=2, **special, **SMALL[family])
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("family", SMALL)
def test_depths(family):
    """Embeddings are 0, three layers 1 to 3, pooler and head 4, whatever the family calls them."""
    model = small(family)
    place = depths(model)
    assert place.keys() == dict(model.named_parameters()).keys()
    for name, depth in place.items():
        if "embeddings" in name:
            assert depth == 0, name
        elif name.startswith(("classifier", "pre_classifier", "pooler", "head")):
            assert depth == 4, name
    for layer in range(3):
        inside = {depth for name, depth in place.items() if f"layer.{layer}." in name or f"layers.{layer}." in name}
        assert inside == {layer + 1}


@pytest.mark.parametrize("family", SMALL)
def test_freeze_and_optimizer_state(family):
    """Frozen layers take the embeddings with them, and are in no group of the optimizer."""
    model = small(family)
    freeze(model, 2, False)
    place = depths(model)
    assert {place[name] for name, p in model.named_parameters() if p.requires_grad} == {3, 4}
    grouped = {id(p) for group in make_optimizer(model, Training()).param_groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_freeze_embeddings_alone_and_too_much():
    model = small("bert")
    freeze(model, 0, True)
    assert {depths(model)[n] for n, p in model.named_parameters() if not p.requires_grad} == {0}
    with pytest.raises(UserError, match="freeze_layers: the model has 3 layers, got 4"):
        freeze(model, 4, False)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_layer_decay_and_weight_decay(family):
    """The head and the top layer learn at the full rate, each layer below at half that of the one above; biases and
    normalisation weights have no weight decay, matrices do."""
    model = small(family)
    place, names = depths(model), {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, Training(learning_rate=1.0, layer_decay=0.5, weight_decay=0.1))
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["peak"] == 0.5 ** (3 - min(place[name], 3)), name
            plain = name.endswith("bias") or "norm" in name.lower()
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert seen == set(place)


def test_rates_follow_the_schedule():
    """Every group is at the same share of its own peak."""
    optimizer = make_optimizer(small("bert"), Training(learning_rate=0.1, layer_decay=0.5))
    set_rates(optimizer, 0.25)
    assert {round(g["lr"] / g["peak"], 6) for g in optimizer.param_groups} == {0.25}
    assert max(g["lr"] for g in optimizer.param_groups) == pytest.approx(0.025)


def test_sgd_has_its_momentum():
    optimizer = make_optimizer(small("bert"), Training(optimizer="sgd", momentum=0.7))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


@pytest.mark.parametrize(
    ("kind", "middle", "last"), [("linear", 0.5, 1 / 80), ("cosine", 0.5, None), ("constant", 1.0, 1.0)]
)
def test_schedules(kind, middle, last):
    """Warm-up over 20 of 100 steps, then the named course; no step has a rate of zero."""
    training = Training(schedule=kind, warmup=0.2)
    rates = [schedule(step, 100, training) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert rates[20] == 1.0
    assert rates[60] == pytest.approx(middle)
    assert rates[99] == pytest.approx(last or 0.5 * (1 + math.cos(math.pi * 79 / 80)))
    assert min(rates) > 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedule_of_few_steps(kind):
    """One step, and a warm-up over everything, still have a rate."""
    assert schedule(0, 1, Training(schedule=kind)) == 1.0
    assert all(schedule(step, 3, Training(schedule=kind, warmup=1.0)) > 0 for step in range(3))


def test_precision(monkeypatch):
    """`auto` follows the machine's capability; a wish is a wish."""
    cpu = torch.device("cpu")
    for avx, amx, expected in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert choose_precision("auto", cpu) == expected
        assert choose_precision("bf16", cpu) == "bf16" and choose_precision("float32", cpu) == "float32"


def test_memory_errors_are_told_from_others():
    """The error that torch itself raises for an impossible allocation on this CPU counts, other errors do not."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_resolve_base(tiny_model, tmp_path, monkeypatch):
    """Folders, home folders and installed packages become folders, hub names stay; what is wrong says what is near."""
    assert resolve_base(str(tiny_model)) == str(tiny_model)
    assert resolve_base("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert resolve_base(f"~/{tiny_model.name}") == str(tiny_model)
    with pytest.raises(UserError, match=f"no such folder.*did you mean .*{tiny_model.name}"):
        resolve_base(str(tiny_model)[:-1] + "x")
    with pytest.raises(UserError, match="no such folder"):
        resolve_base("models/of/nobody")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="needs a model's folder.*did you mean .*inner"):
        resolve_base(str(tmp_path))
    with pytest.raises(UserError, match="needs the installed package"):
        resolve_base("pkg://no_such_package/model")


def test_quiet_restores():
    """Transformers talks again afterwards, as loudly as before."""
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


class TestFiles:
    def test_best_is_whole_or_the_one_before(self, tmp_path, monkeypatch, capfd):
        """Killed at any of its renames, the folder of the best model is the new one or the old one, never none."""
        model, best = small("bert"), tmp_path / "best"
        files.save_best(model, best, {"step": 1})
        rename = os.rename
        for deadly in (1, 2):
            calls = 0

            def dies(source, target, deadly=deadly):
                nonlocal calls
                calls += 1
                if calls == deadly:
                    raise KeyboardInterrupt
                rename(source, target)

            monkeypatch.setattr(os, "rename", dies)
            with pytest.raises(KeyboardInterrupt):
                files.save_best(model, best, {"step": 2})
            monkeypatch.setattr(os, "rename", rename)
            assert files.read_best(best) == {"step": 1}
            assert AutoModelForSequenceClassification.from_pretrained(best)
        files.save_best(model, best, {"step": 3})
        assert files.read_best(best) == {"step": 3}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]

    def test_snapshot_of_another_run_is_left_alone(self, tmp_path):
        """Other settings, other run: nothing is taken over."""
        model = small("bert")
        optimizer = make_optimizer(model, Training())
        run = {"training": dataclasses.asdict(Training())}
        files.save_snapshot(tmp_path, model, optimizer, {"run": run, "step": 3})
        assert files.load_snapshot(tmp_path, model, optimizer, {"training": {}}) is None
        assert files.load_snapshot(tmp_path, model, optimizer, run) == {"run": run, "step": 3}
        files.forget_snapshot(tmp_path)
        assert files.load_snapshot(tmp_path, model, optimizer, run) is None

    def test_a_failed_write_is_an_os_error(self, tmp_path):
        """Where no more can be written, safetensors' own error becomes the one that every caller knows, with the path;
        the snapshot before it stays."""
        model = small("bert")
        optimizer = make_optimizer(model, Training())
        files.save_snapshot(tmp_path, model, optimizer, {"run": {}, "step": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(OSError) as caught:
                files.save_snapshot(tmp_path, model, optimizer, {"run": {}, "step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert str(tmp_path) in caught.value.filename
        assert files.load_snapshot(tmp_path, model, optimizer, {}) == {"run": {}, "step": 1}

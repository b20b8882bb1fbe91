"""docs/loops.md: each of its blocks runs, and the recipe acts in it."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments
from transformers import Trainer as HfTrainer

import knep

PAGE = (Path(__file__).parents[1] / "docs" / "loops.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.M | re.S))


def names(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(48, 8)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    data = [{"input_ids": torch.randint(0, 32, (6,)), "labels": torch.tensor(i % 2)} for i in range(48)]
    return {
        "knep": knep, "L": L, "F": F, "torch": torch, "Fabric": Fabric, "Accelerator": Accelerator,
        "TrainerCallback": TrainerCallback, "TrainingArguments": TrainingArguments, "HfTrainer": HfTrainer,
        "model": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), "train_loader": loader,
        "val_loader": loader, "hf_model": BertForSequenceClassification(config), "hf_data": data,
        "folder": str(tmp_path / "hf"),
    }  # fmt: skip


def test_the_page_has_a_block_for_each_loop():
    assert list(BLOCKS) == ["Lightning", "A loop of your own", "Fabric", "accelerate", "Hugging Face's Trainer"]


@pytest.mark.parametrize("loop", BLOCKS)
def test_a_block_runs_and_the_recipe_acts(loop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = names(tmp_path)
    model = given["hf_model"] if "Hugging" in loop else given["model"]
    exec(compile(BLOCKS[loop], loop, "exec"), given)
    if loop == "Lightning":
        effects = given["callbacks"].effects()
        assert effects["optimizer"].startswith("Muon, 12 steps")
        assert "average of" in effects["averaging"]
        return
    optimizer, average = given["optimizer"], given["average"]
    assert "Muon" in type(getattr(optimizer, "optimizer", optimizer)).__name__
    assert average.count in (6, 12)
    group = optimizer.param_groups[0]
    assert group["lr"] < 0.01 * group["initial_lr"]  # the schedule came to its end
    own = nn.utils.parameters_to_vector(model.parameters()).detach()
    with average.swapped():
        assert not torch.equal(own, nn.utils.parameters_to_vector(model.parameters()).detach())


def test_every_gradient_is_clipped_in_hugging_faces_trainer(tmp_path, monkeypatch):
    given = names(tmp_path)
    seen = []
    block = BLOCKS["Hugging Face's Trainer"].replace(
        '"regularization=none"]', '"regularization=none", "clip.theta=1e-3"]'
    )
    assert "clip.theta" in block
    given["see"] = lambda model: seen.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
    block = block.replace("        average.update()\n", "        average.update()\n        see(model)\n")
    exec(compile(block, "page", "exec"), given)
    assert len(seen) == 6
    assert max(seen) <= 1.001e-3

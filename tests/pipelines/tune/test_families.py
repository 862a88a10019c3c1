"""What differs between families: templates, targets, experts, windows, positions, tied embeddings, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from labs.sight import look
from pipelines import catalogue
from pipelines.catalogue import Model
from pipelines.errors import TrainingFailed
from pipelines.tune import adapter, rehearsal
from pipelines.tune.finetune import load_base
from pipelines.tune.packing import Encoded, collate, encode, join, tree
from pipelines.tune.recipe import Lora
from pipelines.tune.rows import Row
from pipelines.tune.sft import label_logits
from pipelines.tune.turns import end_of_turn, has_system_turn, load_tokenizer

FAMILIES = [m for m in catalogue.all_models() if m.runnable and (m.like is None or m.name in ("gemma-3-1b", "qwen-2.5-0.5b"))]
QUICK = {"gemma-3", "mixtral-8x7b"}
SYSTEM = "Answer in few words."
LONG = "The lighthouse stands on the northern cape, and its lamp is lit at dusk by the keeper's daughter. " * 4
NO_SYSTEM_TURN = {"gemma", "mixtral-8x7b", "phi-3-medium"}
SYSTEM_MOVES = {"mistral-7b", "mistral-8x22b", "mistral-large"}  # to the last question, so a chat of several is no prefix
LORA = Lora(rank=4, alpha=8, dropout=0.0)


def parts(names: set[str] = QUICK) -> list[Any]:
    return [pytest.param(m, marks=[] if m.name in names else pytest.mark.slow, id=m.name) for m in FAMILIES]


@pytest.fixture(scope="module", params=parts())
def family(request: pytest.FixtureRequest) -> Model:
    model: Model = request.param
    return model


@pytest.fixture(scope="module")
def folder(family: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rehearsal.build(family, rehearsal.texts(), tmp_path_factory.mktemp(family.name))


@pytest.fixture(scope="module")
def tokenizer(family: Model, folder: Path) -> Any:
    return load_tokenizer(folder, family)


def row(*turns: str) -> Row:
    roles = ["system", *(("user", "assistant")[i % 2] for i in range(len(turns) - 1))]
    return Row(tuple({"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)))


def tuned(family: Model, folder: Path) -> Any:
    """The family with an adapter that changes something."""
    import torch

    assert family.tuning
    torch.manual_seed(0)
    where = family.tuning
    model = adapter.attach(load_base(folder, "cpu", quantised=False), LORA, where.target_modules, quantised=False,
                           experts=where.expert_parameters, frozen=where.frozen)  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_every_reply_is_supervised_to_its_end_of_turn(family: Model, tokenizer: Any) -> None:
    chat = row(SYSTEM, "Who keeps it?", "Her father.", "And who lights it?", "She does.")
    if family.name in SYSTEM_MOVES:
        with pytest.raises(TrainingFailed, match="renders a prompt differently"):
            encode(chat, tokenizer)
        chat = Row(({"role": "user", "content": f"{SYSTEM} {chat.messages[1]['content']}"}, *chat.messages[2:]))
    encoded = encode(chat, tokenizer)
    learnt = [label for label in encoded.labels if label is not None]
    end = end_of_turn(tokenizer)
    assert learnt.count(end) == 2 and learnt[-1] == end
    text = tokenizer.decode([token for token in learnt if token != end])
    assert "Her father." in text and "She does." in text and "Who" not in text
    assert SYSTEM in tokenizer.decode(encoded.tokens), "the system turn is not lost"
    assert has_system_turn(tokenizer) == (family.name not in NO_SYSTEM_TURN)


def test_packed_rows_have_the_logits_of_the_model_itself(family: Model, folder: Path, tokenizer: Any) -> None:
    """Masks of windows and chunks, penalties of distance and scales of logits: whatever a family does, packing keeps it."""
    import torch

    from pipelines.architecture import takes_positions

    model = tuned(family, folder).eval()
    rows = [encode(row(SYSTEM, f"{LONG}\n{question}", reply), tokenizer) for question, reply in (
        ("Who lights it?", "The daughter."), ("Where is it?", "On the cape."))]  # fmt: skip
    other = encode(row(SYSTEM, "Hello", "Good day."), tokenizer)
    assert min(len(r.tokens) for r in rows) > 64, "longer than a window of the rehearsals"
    shared = [tree(rows)] if takes_positions(model.config) else [tree([r]) for r in rows]
    batch = collate([join([tree([other]), *shared])], tokenizer.pad_token_id)
    with torch.inference_mode():
        packed = label_logits(model, batch)
        alone = torch.cat([_alone(model, r) for r in (other, *rows)])
    assert packed.shape == alone.shape
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-3)


def _alone(model: Any, encoded: Encoded) -> Any:
    import torch

    places = [place for place, label in enumerate(encoded.labels) if label is not None]
    return model(input_ids=torch.tensor([encoded.tokens])).logits[0, places]


def test_targets_resolve_and_what_is_frozen_stays_so(family: Model, folder: Path) -> None:
    assert family.tuning
    trained = [name for name, p in tuned(family, folder).named_parameters() if p.requires_grad]
    for target in (*family.tuning.target_modules, *(e.split(".")[0] for e in family.tuning.expert_parameters)):
        assert any(f".{target}." in name for name in trained), target
    for part in family.tuning.frozen:
        assert not any(f".{part}." in name for name in trained), part
    assert all("lora_" in name for name in trained)
    experts = [name for name in trained if ".experts." in name]
    assert bool(experts) == bool(family.tuning.expert_parameters)


def test_the_merged_model_is_read_again_with_its_embeddings_as_they_were(family: Model, folder: Path, tmp_path: Path) -> None:
    import torch

    ids = torch.arange(5, 45)[None]
    model = tuned(family, folder).eval()
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        base = load_base(folder, "cpu", quantised=False)(input_ids=ids).logits
    model.merge_and_unload(safe_merge=True).save_pretrained(tmp_path)
    again = load_base(tmp_path, "cpu", quantised=False)
    with torch.inference_mode():
        after = again(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    assert float((base - before).abs().max()) > 1e-3
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert family.config and tied == bool(again.config.get_text_config().tie_word_embeddings)


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param(m, id=m.name) for m in FAMILIES if "image" in m.modality], scope="module")
def test_images_become_tokens(family: Model, tmp_path: Path) -> None:
    assert "image token" in look(family, rehearsal.build(family, rehearsal.texts(), tmp_path))

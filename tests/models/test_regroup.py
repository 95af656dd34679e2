"""A top-k model becomes a MoGE: the same with one group, close with more, closer when healed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mogul.core.errors import ConfigError
from mogul.models.heal import BestRouters, Healing, routers_of
from mogul.models.load import load_model, load_tokenizer
from mogul.models.regroup import find_groups, order_of, regroup, regroup_checkpoint
from mogul.observe.agreement import agreement, kept_of_layer
from mogul.observe.hooks import watch
from mogul.observe.recorder import record_routing
from mogul.observe.tracer import Tracer
from mogul.train.data import shipped_text
from mogul.train.loop import train
from mogul.train.optimizer import TrainSettings

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 24, "moe_intermediate_size": 16,
    "num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 4,
    "tie_word_embeddings": False, "norm_topk_prob": True, "router_weighting": "renormalised",
    "output_router_logits": False, "router_aux_loss_coef": 0.0,
}  # fmt: skip


def tiny(kind="qwen3_moe", **changes):
    known = AutoConfig.for_model(kind).to_dict()
    values = {k: v for k, v in {**SMALL, **changes}.items() if k in known}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate.weight" in name:
                parameter.normal_(0, 0.3)
    return model


def topics(num_rows, length=24, seed=0):
    """Sequences of four languages: each a random walk on its own table of successors."""
    table = np.random.default_rng(7).integers(0, 48, (4, 48, 3))
    rng = np.random.default_rng(seed)
    rows = np.empty((num_rows, length), dtype=np.int64)
    for row in rows:
        language, row[0] = rng.integers(4), rng.integers(48)
        for position in range(1, length):
            row[position] = table[language, row[position - 1], rng.integers(3)]
    return torch.from_numpy(rows)


def batches(seed, size=16):
    rng = np.random.default_rng(seed)
    while True:
        yield topics(size, seed=int(rng.integers(1 << 30)))


@pytest.fixture(scope="module")
def trained():
    """A top-k model trained, without a balance loss, until its routing is skewed."""
    model = tiny()
    train(model, batches(0), TrainSettings(lr=5e-3, max_steps=120, weight_decay=0.0))
    return model


@pytest.fixture(scope="module")
def trace(trained):
    with Tracer(trained) as tracer, torch.no_grad():
        trained(topics(80, seed=1))
    return tracer.trace()


HELD_OUT = topics(40, seed=2)


def test_training_skewed_the_routing(trace):
    assert (trace.count.max(1) / trace.count.mean(1)).min() > 1.3


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "moge"])
def test_one_group_is_the_identical_model(kind):
    model = tiny(kind)
    order = {layer: np.zeros(16, dtype=int) for layer in (0, 1)}
    with torch.no_grad():
        before = model(HELD_OUT).logits
        after = regroup(model, order, 1)(HELD_OUT).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert before.abs().max() > 0.3


def test_grouped_picks_are_the_best_of_each_group(trained, trace):
    groups = find_groups(trace, 4)
    grouped = regroup(trained, groups, 4)
    with record_routing(grouped) as recording, torch.no_grad():
        grouped(HELD_OUT)
    ids = recording.ids()
    assert (np.sort(ids // 4, axis=-1) == np.arange(4)).all()
    with record_routing(trained) as original, torch.no_grad():
        trained(HELD_OUT)
    first = original.forwards(0)[0]
    position = np.argsort(order_of(groups[0]))  # new position of every old expert
    share = (
        np.mean([len(set(position[a]) & set(b)) for a, b in zip(first, ids[0], strict=True)]) / 4
    )
    measured = agreement(trained, grouped, [HELD_OUT], groups, 4)
    weights = torch.ones(first.shape)
    kept, _ = kept_of_layer(torch.from_numpy(first), weights, torch.from_numpy(groups[0]), 4)
    assert share == pytest.approx(float(kept))  # layer 0 sees the same inputs in both
    assert 0 < measured.kept <= 1


def test_kept_mass_by_hand():
    ids = torch.tensor([[0, 1, 2], [0, 2, 8]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.6, 0.0]])
    kept, mass = kept_of_layer(ids, weights, torch.tensor([0, 0, 1, 2]), 3)
    assert float(kept) == pytest.approx(4 / 5)  # 8 is a null pick
    assert float(mass) == pytest.approx((0.5 + 0.2 + 0.4 + 0.6) / 2.0)


def check_20_seeds(model, trace, held_out):
    """Mass kept on unseen tokens, above random groups of the seed and contiguous ones."""
    layers, experts = trace.meta.layers, trace.meta.model.num_experts
    plain = {layer: np.arange(experts) * 4 // experts for layer in layers}
    seen = {}
    with torch.no_grad(), watch(model, lambda picks: seen.update({picks.layer: picks})):
        model(held_out)

    def mass(groups):
        found = [
            kept_of_layer(seen[i].ids, seen[i].weights, torch.from_numpy(groups[i]), 4)[1]
            for i in layers
        ]
        return float(sum(found)) / len(layers)

    contiguous = mass(plain)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shuffled = {layer: rng.permutation(group) for layer, group in plain.items()}
        found = mass(find_groups(trace, 4, seed=seed))
        assert found > mass(shuffled)
        assert found > contiguous


def test_mass_beats_random_and_contiguous_groups_on_20_of_20_seeds(trained, trace):
    check_20_seeds(trained, trace, HELD_OUT)


def test_mass_of_the_carried_top_k_model_on_20_of_20_seeds():
    model, tokenizer, text = load_model("nano-topk"), load_tokenizer("nano-topk"), shipped_text()

    def ids(texts, rows):
        found = tokenizer("\n".join(texts)[: 3000 * rows])["input_ids"][: 256 * rows]
        return torch.tensor(found).view(rows, 256)

    with Tracer(model) as tracer, torch.no_grad():
        model(ids(text.train, 8))
    check_20_seeds(model, tracer.trace(), ids(text.held_out, 4))


def heal(grouped, original, steps, seed):
    """The verb's way: distance and text, warm-up, cosine, the best routers kept."""
    healing = Healing(grouped, original)
    settings = TrainSettings(
        lr=3e-4, max_steps=steps, warmup_steps=5, weight_decay=0.0, schedule="cosine"
    )
    best = BestRouters(healing, lambda: iter([topics(32, seed=77)]), every=20)
    train(healing, best.batches(batches(seed)), settings)
    best.restore()
    return best


def test_healing_lowers_the_held_out_loss_and_moves_only_routers(trained, trace):
    groups = find_groups(trace, 4)
    grouped = regroup(trained, groups, 4)
    held_out = [topics(200, seed=5)]
    before = agreement(trained, grouped, held_out, groups, 4)
    others = {n: p.clone() for n, p in grouped.named_parameters() if ".gate." not in n}
    best = heal(grouped, trained, 100, seed=3)
    after = agreement(trained, grouped, held_out, groups, 4)
    lost = before.loss_after - before.loss_before
    assert lost > 0
    assert after.loss_after < before.loss_after - 0.2 * lost
    assert min(best.losses) < best.losses[0]
    assert all(torch.equal(dict(grouped.named_parameters())[n], p) for n, p in others.items())


@pytest.mark.full
def test_healing_helps_on_every_of_five_models():
    held_out = [topics(400, seed=99)]
    for seed in range(5):
        model = tiny()
        train(model, batches(1000 + seed), TrainSettings(lr=5e-3, max_steps=200, weight_decay=0.0))
        with Tracer(model) as tracer, torch.no_grad():
            model(topics(80, seed=1))
        groups = find_groups(tracer.trace(), 4)
        grouped = regroup(model, groups, 4)
        before = agreement(model, grouped, held_out, groups, 4)
        heal(grouped, model, 200, seed=3)
        after = agreement(model, grouped, held_out, groups, 4)
        lost = before.loss_after - before.loss_before
        print(f"seed {seed}: {(before.loss_after - after.loss_after) / lost:.2f} of the lost loss "
              f"{lost:.4f}, KL {before.kl:.4f} -> {after.kl:.4f}")  # fmt: skip
        assert after.loss_after < before.loss_after - 0.3 * lost


def test_the_best_routers_come_back(trained, trace):
    grouped = regroup(trained, find_groups(trace, 4), 4)
    first = [p.clone() for p in routers_of(grouped)]
    healing = Healing(grouped, trained)
    best = BestRouters(healing, lambda: iter([topics(16, seed=77)]), every=5)
    train(healing, best.batches(batches(3)), TrainSettings(lr=0.5, max_steps=10, weight_decay=0.0))
    assert best.losses[-1] > best.losses[0]  # a ruinous learning rate
    best.restore()
    assert all(torch.equal(a, b) for a, b in zip(first, routers_of(grouped), strict=True))


def test_the_written_checkpoint_is_the_grouped_model(trained, trace, tmp_path):
    grouped = regroup(trained, find_groups(trace, 2), 2)
    grouped.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.router_n_groups == 2
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(HELD_OUT).logits, grouped(HELD_OUT).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "moge"])
def test_streaming_writes_the_same_model(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "source")
    rng = np.random.default_rng(0)
    groups = {layer: rng.permutation(np.arange(16) // 4) for layer in (0, 1)}
    regroup_checkpoint(tmp_path / "source", tmp_path / "out", groups, 4)
    with torch.no_grad():
        wanted = regroup(model, groups, 4)(HELD_OUT).logits
        torch.testing.assert_close(
            load_model(tmp_path / "out")(HELD_OUT).logits, wanted, rtol=0, atol=1e-5
        )
    with pytest.raises(ConfigError, match=r"no groups for the layers \[1\]"):
        regroup_checkpoint(tmp_path / "source", tmp_path / "two", {0: groups[0]}, 4)
    assert not (tmp_path / "two").exists()


def test_families_and_groups_that_cannot_be_are_named(trained, trace):
    with pytest.raises(ConfigError, match="family 'olmoe' has layers a MoGE does not have"):
        regroup(tiny("olmoe"), {}, 2)
    with pytest.raises(ConfigError, match="it has 4 groups already"):
        regroup(tiny("moge", router_n_groups=4), {}, 2)
    with pytest.raises(ConfigError, match="4 picks a token cannot be shared equally by 8 groups"):
        find_groups(trace, 8)
    with pytest.raises(ConfigError, match=r"no groups for the layers \[0, 1\]"):
        regroup(trained, {}, 2)


def test_routers_heal_in_float32_and_come_back(trained, trace):
    grouped = regroup(trained, find_groups(trace, 4), 4).bfloat16()
    healing = Healing(grouped, trained)
    assert {p.dtype for p in routers_of(grouped)} == {torch.float32}
    healing.finish()
    assert {p.dtype for p in grouped.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in grouped.parameters())


def test_a_layer_no_trace_sees_keeps_its_order():
    model = tiny("moge", num_nextn_predict_layers=1)
    groups = {layer: np.arange(16)[::-1] // 4 for layer in (0, 1)}
    grouped = regroup(model, groups, 4)
    before, after = model.state_dict(), grouped.state_dict()
    further = [name for name in before if ".layers.2." in name and ".mlp." in name]
    assert further
    assert all(torch.equal(before[name], after[name]) for name in further)
    name = "model.layers.0.mlp.gate.weight"
    assert torch.equal(after[name], before[name][order_of(groups[0])])

"""Traces: what they hold, how they add, how they are written and refused."""

import json

import numpy as np
import pytest

from mogul.core.errors import ArtifactError, ConfigError
from mogul.spec.picks import batch_histograms, trace_of_picks
from mogul.spec.trace import META_FILE, ModelStamp, Trace, load_trace, merge

STAMP = ModelStamp(
    name="m", family="qwen3_moe", num_layers=3, num_experts=8, top_k=2, hidden_size=4
)


def random_picks(num_tokens, layers=3, seed=0, stamp=STAMP):
    rng = np.random.default_rng(seed)
    noise = rng.random((num_tokens, layers, stamp.num_experts)) ** np.arange(
        1, stamp.num_experts + 1
    )
    return np.argsort(noise, axis=-1)[..., : stamp.top_k]


def test_counts_by_hand():
    ids = np.array([[[0, 1]], [[0, 2]], [[8, 2]]])  # one layer; 8 is a null pick
    trace = trace_of_picks(ids, STAMP.replace(num_layers=1), batch_sizes=(1, 3))
    assert trace.count[0].tolist() == [2, 1, 2, 0, 0, 0, 0, 0]
    pair = trace.arrays["coactivation"][0]
    assert (pair[0, 1], pair[0, 2], pair[1, 2], pair[0, 0]) == (1, 1, 0, 2)
    assert trace.arrays["distinct_hist"][0, 0].tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 0]
    assert trace.arrays["distinct_hist"][1, 0, 3] == 1
    assert trace.arrays["busiest_hist"][1, 0, 1] == 1


def test_transition_joins_neighbouring_layers():
    ids = np.array([[[0, 1], [2, 3]], [[0, 4], [2, 5]]])
    trace = trace_of_picks(ids, STAMP.replace(num_layers=2))
    assert trace.arrays["transition"][0, 0, 2] == 2
    assert trace.arrays["transition"][0, 1, 3] == 1
    assert trace.arrays["transition"][0].sum() == 2 * 2 * 2


def test_histograms_of_large_batches_are_binned():
    hot = np.zeros((256, 4), dtype=np.int64)
    hot[:, 1] = 1
    distinct, busiest = batch_histograms(hot, 128)
    assert distinct[1] == 2
    assert busiest[63] == 2


def test_merge_is_the_trace_of_both():
    ids = random_picks(512)
    weights = np.random.default_rng(1).random(ids.shape)
    options = {"batch_sizes": (1, 16, 64)}
    whole = trace_of_picks(ids, STAMP, weights=weights, **options)
    parts = [
        trace_of_picks(ids[a:b], STAMP, weights=weights[a:b], seed=a, **options)
        for a, b in ((0, 192), (192, 512))
    ]
    both = merge(*parts)
    assert both.meta.num_tokens == 512
    for name, array in whole.arrays.items():
        if array.dtype.kind in "iu" and not name.startswith("sample"):
            assert (both.arrays[name] == array).all(), name
        elif array.dtype.kind == "f":
            np.testing.assert_allclose(both.arrays[name], array, rtol=1e-12)


def test_merged_samples_are_the_smallest_keys_of_both():
    parts = [
        trace_of_picks(random_picks(300, seed=s), STAMP, sample_limit=100, seed=s) for s in (1, 2)
    ]
    both = merge(*parts)
    keys = np.sort(np.concatenate([p.arrays["sample_key"] for p in parts]))[:100]
    assert (both.arrays["sample_key"] == keys).all()
    again = merge(parts[1], parts[0])
    assert (again.arrays["sample_ids"] == both.arrays["sample_ids"]).all()


def test_merge_unites_tasks():
    one, two = (trace_of_picks(random_picks(64, seed=s), STAMP) for s in (1, 2))
    two = type(two)(two.meta.replace(tasks=("code",)), two.arrays)
    both = merge(one, two)
    assert both.meta.tasks == ("all", "code")
    assert (both.arrays["task_count"][1] == two.count).all()
    assert set(both.arrays["sample_task"].tolist()) == {0, 1}


def test_saved_trace_is_the_same_and_overwrites_cleanly(tmp_path):
    trace = trace_of_picks(random_picks(100), STAMP)
    trace.save(tmp_path / "t")
    merged = merge(trace, trace_of_picks(random_picks(50, seed=3), STAMP))
    merged.save(tmp_path / "t")
    back = load_trace(tmp_path / "t")
    assert back.meta.num_tokens == 150
    assert all((back.arrays[name] == array).all() for name, array in merged.arrays.items())
    assert len(list((tmp_path / "t").iterdir())) == 2


def test_trace_of_a_large_model_stays_small(tmp_path):
    stamp = STAMP.replace(num_layers=48, num_experts=128, top_k=8)
    trace = trace_of_picks(random_picks(256, layers=48, stamp=stamp), stamp)
    full = {**trace.arrays}  # as many sampled tokens as there may be
    full |= {n: np.resize(full[n], (4096, *full[n].shape[1:])) for n in full if "sample" in n}
    type(trace)(trace.meta, full).save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10e6


def test_damage_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="holds no trace"):
        load_trace(tmp_path)
    trace_of_picks(random_picks(50), STAMP).save(tmp_path)
    stats = next(tmp_path.glob("*.safetensors"))
    data = stats.read_bytes()
    stats.write_bytes(data[:-10])
    with pytest.raises(ArtifactError, match=f"{stats.name} is damaged: {len(data) - 10} bytes"):
        load_trace(tmp_path)
    stats.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="was changed after"):
        load_trace(tmp_path)
    stats.unlink()
    with pytest.raises(ArtifactError, match="cannot read"):
        load_trace(tmp_path)
    meta = json.loads((tmp_path / META_FILE).read_text())
    (tmp_path / META_FILE).write_text(json.dumps({**meta, "schema_version": 99}))
    with pytest.raises(ArtifactError, match="schema version 99"):
        load_trace(tmp_path)


def test_a_trace_that_cannot_be_is_refused():
    trace = trace_of_picks(random_picks(50), STAMP)
    with pytest.raises(ArtifactError, match="'entropy_sum' of the trace is not finite"):
        Trace(trace.meta, {**trace.arrays, "entropy_sum": np.full(3, np.nan)})
    with pytest.raises(ArtifactError, match="holds no 'count'"):
        Trace(trace.meta, {})
    with pytest.raises(ConfigError, match="cannot pick 99"):
        STAMP.replace(top_k=99)


def test_another_model_is_refused():
    one = trace_of_picks(random_picks(50), STAMP.replace(weights_hash="aa"))
    two = trace_of_picks(random_picks(50), STAMP.replace(weights_hash="bb"))
    with pytest.raises(ConfigError, match="another model: weights_hash is bb there"):
        merge(one, two)
    in_memory = trace_of_picks(random_picks(50), STAMP.replace(name="other"))
    assert merge(one, in_memory).meta.num_tokens == 100  # no hash, other name: the same shape


def test_picks_of_a_wrong_shape_are_refused():
    with pytest.raises(ArtifactError, match=r"shape \(5, 2\)"):
        trace_of_picks(np.zeros((5, 2), dtype=int), STAMP)
    with pytest.raises(ArtifactError, match="tokens x layers x 2"):
        trace_of_picks(np.zeros((0, 3, 2), dtype=int), STAMP)

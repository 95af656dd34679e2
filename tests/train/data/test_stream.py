"""The order of training data: nothing twice in an epoch, weights kept, resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogul.core.errors import ArtifactError, ConfigError
from mogul.train.data import DataSpec, open_stream
from mogul.train.data.shards import MANIFEST, Shard, TokenManifest, dtype_for, sha256_of


def write(folder: Path, *shards: np.ndarray, vocab_size: int = 60000) -> str:
    """A token folder whose train part holds these ids."""
    folder.mkdir(parents=True)
    found = []
    for number, ids in enumerate(shards):
        file = folder / f"train-{number:05d}.bin"
        ids.astype(dtype_for(vocab_size)).tofile(file)
        found.append(
            Shard(file=file.name, part="train", tokens=len(ids), documents=1, text_bytes=len(ids),
                  sha256=sha256_of(file))
        )  # fmt: skip
    manifest = TokenManifest(
        vocab_size=vocab_size, end_of_text_id=0, byte_level=False, shards=tuple(found),
        sources=("test",), held_out=0.0,
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    first = write(root / "first", np.arange(0, 150), np.arange(150, 403))
    second = write(root / "second", np.arange(1000, 1100))
    return first, second


def stream(sources, *, batch_size=3, length=10, seed=0, **options):
    spec = DataSpec(sources=sources)
    return open_stream(spec, batch_size=batch_size, sequence_length=length, seed=seed, **options)


@given(length=st.integers(2, 60), seed=st.integers(0, 1000), epoch=st.integers(0, 2))
def test_an_epoch_shows_every_token_at_most_once(sources, length, seed, epoch):
    opened = stream([sources[0]], batch_size=1, length=length, seed=seed)
    per_epoch = 403 // length
    for _ in range(epoch * per_epoch):
        next(opened)
    rows = torch.cat([next(opened) for _ in range(per_epoch)])
    assert rows.shape == (per_epoch, length)
    assert rows.unique().numel() == per_epoch * length
    # Each row runs on through shard ends, and from the end of the ring to its start.
    assert bool(((rows[:, 1:] - rows[:, :-1]) % 403 == 1).all())
    assert opened.epochs == epoch + 1


@given(weights=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), steps=st.integers(1, 60))
def test_shares_hold_after_every_window(sources, weights, steps):
    paths = [{"path": path, "weight": w} for path, w in zip(sources, weights, strict=True)]
    opened = stream(paths, batch_size=1)
    first = sum(int(next(opened)[0, 0]) < 1000 for _ in range(steps))
    assert abs(first - steps * weights[0] / sum(weights)) <= 1


def test_without_weights_sources_have_the_share_of_their_tokens(sources):
    opened = stream(list(sources), batch_size=1)
    rows = torch.cat([next(opened) for _ in range(50)])
    assert abs(int((rows[:, 0] < 1000).sum()) - 50 * 403 / 503) <= 1
    assert opened.tokens_per_epoch == 500


@given(before=st.integers(0, 90), batch_size=st.integers(1, 5), after=st.integers(1, 20))
def test_a_restored_stream_goes_on_with_the_same_windows(sources, before, batch_size, after):
    whole = stream(list(sources), batch_size=1, seed=4)
    for _ in range(before):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = stream(list(sources), batch_size=batch_size, seed=4)
    resumed.restore(state)
    expected = torch.cat([next(whole) for _ in range(after * batch_size)])
    assert torch.equal(torch.cat([next(resumed) for _ in range(after)]), expected)


def test_seed_and_epoch_change_the_order(sources):
    def rows(seed, skip):
        opened = stream([sources[0]], batch_size=40, seed=seed)
        for _ in range(skip):
            next(opened)
        return next(opened)

    assert torch.equal(rows(0, 0), rows(0, 0))
    assert not torch.equal(rows(0, 0), rows(1, 0))
    assert not torch.equal(rows(0, 0), rows(0, 1))


def test_ranks_share_one_order(sources):
    whole = stream(list(sources), batch_size=4)
    ranks = [stream(list(sources), batch_size=2, rank=r, num_ranks=2) for r in (0, 1)]
    for _ in range(5):
        assert torch.equal(torch.cat([next(rank) for rank in ranks]), next(whole))
    assert ranks[0].state() == ranks[1].state() == whole.state()


def test_a_state_of_other_data_is_refused(sources, tmp_path):
    opened = stream([sources[0]])
    other = stream([write(tmp_path / "other", np.arange(403))])
    with pytest.raises(ConfigError, match="differ in 'checksums'"):
        opened.restore(other.state())
    with pytest.raises(ConfigError, match="differ in 'seed': 1 there, 0 here"):
        opened.restore(stream([sources[0]], seed=1).state())
    with pytest.raises(ConfigError, match="'sequence_length': 12 there"):
        opened.restore(stream([sources[0]], length=12).state())
    with pytest.raises(ArtifactError, match="state of the data is damaged"):
        opened.restore({**opened.state(), "taken": [-1]})


def test_wide_vocabularies_are_read(tmp_path):
    ids = np.arange(70_000, 70_050)
    opened = stream([write(tmp_path / "wide", ids, vocab_size=1 << 17)], batch_size=1)
    assert set(next(opened).flatten().tolist()) <= set(ids.tolist())


def test_what_cannot_be_is_refused(sources, tmp_path):
    with pytest.raises(ConfigError, match="403 tokens, fewer than one window of 404"):
        stream([sources[0]], length=404)
    with pytest.raises(ConfigError, match="cannot be"):
        stream([sources[0]], length=1)
    small = write(tmp_path / "small", np.arange(99), vocab_size=100)
    with pytest.raises(ConfigError, match=r"different vocabularies: .* has 60000, .* has 100"):
        stream([sources[0], small])
    with pytest.raises(ConfigError, match="has no weight, but others have one"):
        DataSpec(sources=[{"path": "a", "weight": 1.0}, {"path": "b"}])
    with pytest.raises(ConfigError, match="unknown key 'wieght'"):
        DataSpec(sources=[{"path": "a", "wieght": 1.0}])
    with pytest.raises(ArtifactError, match=r"holds no tokens.json"):
        stream([str(tmp_path)])


def test_a_damaged_shard_stops_the_opening(sources, tmp_path):
    path = Path(write(tmp_path / "bad", np.arange(99)))
    file = path / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(ArtifactError, match=r"train-00000.bin does not match its checksum"):
        stream([str(path)])
    spec = DataSpec(sources=str(path), verify=False)
    next(open_stream(spec, batch_size=1, sequence_length=9, seed=0))

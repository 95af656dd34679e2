"""Token folders: what is written, what is held out, what is refused."""

from __future__ import annotations

import gzip
import json
import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogul.cli.main import main
from mogul.core.errors import ArtifactError, ConfigError
from mogul.train.data import DataSpec, held_out_windows, shipped_text
from mogul.train.data.build import BuildSpec, build, is_held_out
from mogul.train.data.shards import dtype_for, open_shard, read_manifest, verify
from mogul.train.data.tokenizing import END_OF_TEXT, bytes_of_tokens, open_tokenizer

WORDS = "the king asked whether naïve œuvres 123 — would do; nobody answered\n"


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    words = WORDS.split()
    return [" ".join(rng.choice(words, 60)) + f" {i}" for i in range(80)]


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (root / "a.jsonl").write_text("\n".join(lines))
    spec = BuildSpec(
        sources=(str(root / "a.jsonl"),), vocab_size=300, held_out=0.2, shard_tokens=3000
    )
    build(spec, root / "tokens")
    return root / "tokens"


def ids_of(folder, part):
    manifest = read_manifest(folder)
    return np.concatenate([open_shard(folder, s, manifest.vocab_size) for s in manifest.of(part)])


def test_shards_hold_the_documents_in_order(folder, texts):
    tokenizer = open_tokenizer(str(folder / "tokenizer"))
    manifest = read_manifest(folder)
    assert manifest.vocab_size == len(tokenizer) == 300
    assert len(manifest.of("train")) > 1
    for part, held in (("train", False), ("held_out", True)):
        wanted = [text for text in texts if is_held_out(text, 0.2) is held]
        decoded = tokenizer.decode(ids_of(folder, part).tolist()).split(END_OF_TEXT)
        assert decoded == [*wanted, ""]
        assert sum(s.documents for s in manifest.of(part)) == len(wanted)
        assert sum(s.text_bytes for s in manifest.of(part)) == sum(len(t.encode()) for t in wanted)
    assert 5 < len([t for t in texts if is_held_out(t, 0.2)]) < 30


def test_bytes_of_tokens_add_up(folder, texts):
    windows = held_out_windows(DataSpec(sources=str(folder)), 64)
    wanted = [text for text in texts if is_held_out(text, 0.2)]
    whole = sum(len(t.encode()) for t in wanted)
    sizes = bytes_of_tokens(open_tokenizer(str(folder / "tokenizer")), 300)
    ids = ids_of(folder, "held_out")
    assert int(sizes[ids].sum()) == whole
    assert windows.ids.ravel().tolist() == ids[: windows.ids.size].tolist()
    assert windows.bytes_per_token.sum() == sizes[ids[: windows.ids.size]].sum()
    assert len(held_out_windows(DataSpec(sources=str(folder)), 64, count=3)) == 3


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    source = folder.parent / "a.jsonl"
    spec = BuildSpec(sources=(str(source),), vocab_size=300, held_out=0.2, shard_tokens=3000)
    build(spec, tmp_path / "again")
    assert read_manifest(tmp_path / "again") == read_manifest(folder)


@given(st.text("ab", min_size=1, max_size=9), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_more(text, a, b):
    if is_held_out(text, min(a, b)):
        assert is_held_out(text, max(a, b))


def test_reads_every_format(tmp_path, texts):
    from pyarrow import parquet, table

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.txt").write_text(texts[0])
    (tmp_path / "in" / "2.txt.xz").write_bytes(lzma.compress(texts[1].encode()))
    row = json.dumps({"text": texts[2] + " \u2028"}, ensure_ascii=False) + "\n\n"
    (tmp_path / "in" / "3.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    parquet.write_table(table({"text": [texts[3], "  ", None]}), tmp_path / "in" / "4.parquet")
    (tmp_path / "in" / "5.txt").write_text(texts[0])  # an equal document
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    spec = BuildSpec(sources=(str(tmp_path / "in"),), vocab_size=257, held_out=0.0)
    manifest = build(spec, tmp_path / "out")
    assert manifest.duplicates == 1
    tokenizer = open_tokenizer(str(tmp_path / "out" / "tokenizer"))
    decoded = tokenizer.decode(ids_of(tmp_path / "out", "train").tolist()).split(END_OF_TEXT)
    assert decoded[:4] == [texts[0], texts[1], texts[2] + " \u2028", texts[3]]
    assert manifest.of("held_out") == ()
    with pytest.raises(ConfigError, match="no tokens in its part 'held_out'"):
        held_out_windows(DataSpec(sources=str(tmp_path / "out")), 8)


def test_the_shipped_text_is_held_out_by_position(tmp_path, capsys):
    out = tmp_path / "tokens"
    args = ["data", "build", "shipped", "--out", str(out), "--vocab-size", "300"]
    assert main([*args, "--held-out", "0.1", "--held-out-by", "position"]) == 0
    corpus = shipped_text()
    found = ids_of(out, "held_out")
    tokenizer = open_tokenizer(str(out / "tokenizer"))
    assert tokenizer.decode(found.tolist()).split(END_OF_TEXT)[:-1] == list(corpus.held_out)
    assert main(["data", "check", str(out)]) == 0
    told = capsys.readouterr().out
    assert "held_out" in told
    assert "all 2 shards have their checksums" in told


def test_a_damaged_shard_is_named(folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "train-00001.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"train-00001.bin does not match its checksum"):
        verify(copy, read_manifest(copy))
    assert main(["data", "check", str(copy)]) == 1
    assert "train-00001.bin" in capsys.readouterr().err
    file.write_bytes(data[:-2])
    with pytest.raises(ArtifactError, match="cut off or damaged"):
        verify(copy, read_manifest(copy))
    file.unlink()
    with pytest.raises(ArtifactError, match=r"train-00001.bin is missing"):
        verify(copy, read_manifest(copy))
    (copy / "tokens.json").write_text('{"version": 1, "vocab_siz": 3}')
    with pytest.raises(ConfigError, match="unknown key 'vocab_siz'"):
        read_manifest(copy)
    with pytest.raises(ArtifactError, match=r"holds no tokens.json"):
        read_manifest(tmp_path)


def test_bad_input_is_named(tmp_path):
    def fails(error, match, name, content, **changes):
        file = tmp_path / name
        file.write_bytes(content)
        spec = BuildSpec(sources=(str(file),), vocab_size=300, **changes)
        with pytest.raises(error, match=match):
            build(spec, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    fails(ArtifactError, r"a.jsonl, line 2 is no JSON", "a.jsonl", b'{"text": "x"}\n{"text\n')
    fails(ArtifactError, r"a.jsonl, line 1 is no JSON: .*surrogates", "a.jsonl", b'"\\ud800"\n')
    fails(ArtifactError, r"line 1 has no text under 'text'", "b.jsonl", b'{"body": "x"}\n')
    fails(ArtifactError, r"c.txt.gz cannot be read", "c.txt.gz", b"no gzip")
    fails(ArtifactError, r"d.txt cannot be read", "d.txt", b"\xff\xfe")
    fails(ArtifactError, r"e.parquet is no Parquet file", "e.parquet", b"none")
    fails(ConfigError, "cannot tell from its name", "f.doc", b"none")
    fails(ConfigError, "hold no text to train on", "g.txt", b"  \n")
    fails(ArtifactError, "no tokenizer", "h.txt", b"words", tokenizer=str(tmp_path / "none.json"))
    fails(ArtifactError, "none does not exist", "h.txt", b"words", tokenizer="none")
    with pytest.raises(ConfigError, match="is no file and no folder"):
        build(BuildSpec(sources=(str(tmp_path / "none"),)), tmp_path / "out")
    with pytest.raises(ConfigError, match="less than or equal to 1048576"):
        BuildSpec(sources=("shipped",), vocab_size=99_999_999_999)
    with pytest.raises(ConfigError, match="cannot hold every byte"):
        build(BuildSpec(sources=("shipped",), vocab_size=200), tmp_path / "out")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokens.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a token folder already"):
        build(BuildSpec(sources=(str(tmp_path / "tokens"),)), tmp_path / "out")


def test_the_width_of_ids_follows_the_vocabulary():
    assert dtype_for(1 << 16).itemsize == 2
    assert dtype_for((1 << 16) + 1).itemsize == 4


def test_reads_a_saved_data_set(tmp_path, texts):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.Dataset.from_dict({"body": texts[:5]}).save_to_disk(tmp_path / "saved")
    spec = BuildSpec(
        sources=(f"hf:{tmp_path / 'saved'}",), vocab_size=257, held_out=0.0, text_key="body"
    )
    manifest = build(spec, tmp_path / "out")
    assert manifest.of("train")[0].documents == 5
    with pytest.raises(ArtifactError, match="has no column 'text'"):
        build(spec.replace(text_key="text"), tmp_path / "other")


def test_a_data_set_without_the_package_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="hf:some/where needs the package datasets"):
        build(BuildSpec(sources=("hf:some/where",)), tmp_path / "out")


def test_the_name_of_a_special_token_is_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"before {END_OF_TEXT} after")
    build(BuildSpec(sources=(str(tmp_path / "a.txt"),), vocab_size=257, held_out=0), tmp_path / "o")
    ids = ids_of(tmp_path / "o", "train").tolist()
    assert ids.count(0) == 1
    assert ids[-1] == 0
    tokenizer = open_tokenizer(str(tmp_path / "o" / "tokenizer"))
    assert tokenizer.decode(ids[:-1]) == f"before {END_OF_TEXT} after"
    assert tokenizer(END_OF_TEXT)["input_ids"] == [0]  # the saved tokenizer is as it was


def test_a_source_that_holds_out_nothing_leaves_the_others_theirs(tmp_path):
    text = "\n".join(f"Line {i} of a text." for i in range(600))
    for name, share in (("all", 0.0), ("some", 0.3)):
        (tmp_path / f"{name}.txt").write_text(text)
        spec = BuildSpec(
            sources=(str(tmp_path / f"{name}.txt"),), vocab_size=300, held_out=share,
            held_out_by="position", tokenizer=str(tmp_path / "all/tokenizer") if share else None,
        )  # fmt: skip
        build(spec, tmp_path / name)
    both = DataSpec(sources=(str(tmp_path / "all"), str(tmp_path / "some")))
    alone = held_out_windows(DataSpec(sources=str(tmp_path / "some")), 16)
    assert (held_out_windows(both, 16).ids == alone.ids).all()
    with pytest.raises(ConfigError, match="all has no tokens in its part 'held_out'"):
        held_out_windows(DataSpec(sources=str(tmp_path / "all")), 16)


def test_what_holds_out_nothing_says_how_to(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("Only one document, and nothing beside it. " * 20)
    out = tmp_path / "tokens"
    words = ["data", "build", str(tmp_path / "one.txt"), "--out", str(out), "--vocab-size", "300"]
    assert main(words) == 0
    assert "nothing is held out; of few documents take parts" in capsys.readouterr().out

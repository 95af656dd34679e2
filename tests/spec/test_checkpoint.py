"""A checkpoint folder is judged by its headers: cut off, missing, contradicting files are named."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from mogul.core.errors import ArtifactError
from mogul.spec.checkpoint import INDEX, read_checkpoint, read_header

A = {"a": np.ones((3, 4), np.float32), "b": np.zeros((5,), np.float16)}
C = {"c": np.ones((2, 2), np.float32)}


@pytest.fixture
def folder(tmp_path):
    """Two files and their index."""
    save_file(A, tmp_path / "model-1.safetensors")
    save_file(C, tmp_path / "model-2.safetensors", metadata={"format": "pt"})
    weight_map = {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def edit_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(index))


def test_names_shapes_dtypes_and_bytes_are_read(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint.files == ["model-1.safetensors", "model-2.safetensors"]
    assert checkpoint.num_bytes == 48 + 10 + 16
    assert checkpoint.bytes_by_dtype == {"F32": 64, "F16": 10}
    entry = checkpoint.tensors["a"]
    assert (entry.shape, entry.dtype, entry.file) == ((3, 4), "F32", "model-1.safetensors")


def test_a_single_file_needs_no_index(tmp_path):
    save_file(A, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_a_folder_without_weights_is_no_error(tmp_path):
    assert read_checkpoint(tmp_path) is None


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_cut_off_file_is_named(folder, kept):
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"model-2\.safetensors") as caught:
        read_checkpoint(folder)
    assert "cut off" in caught.value.__notes__[0]


def test_a_missing_file_is_named(folder):
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-1\.safetensors does not exist"):
        read_checkpoint(folder)


def test_an_index_that_promises_more_is_an_error(folder):
    edit_index(folder, ghost="model-2.safetensors")
    with pytest.raises(ArtifactError, match=r"ghost \(promised in model-2\.safetensors\)"):
        read_checkpoint(folder)


def test_an_index_that_points_to_the_wrong_file_is_an_error(folder):
    edit_index(folder, a="model-2.safetensors")
    with pytest.raises(ArtifactError, match=r"a \(promised in model-2"):
        read_checkpoint(folder)


def test_a_tensor_outside_the_index_is_an_error(folder):
    save_file({**C, "extra": np.ones(1, np.float32)}, folder / "model-2.safetensors")
    with pytest.raises(ArtifactError, match="1 tensors are in no index entry, first extra"):
        read_checkpoint(folder)


@pytest.mark.parametrize("header", [b"[1, 2]", b'{"a": {"dtype": "F32"}}', b"{not json"])
def test_a_header_of_another_kind_is_an_error(tmp_path, header):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ArtifactError, match=r"odd\.safetensors has a"):
        read_header(path)

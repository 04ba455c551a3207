"""Tensors by name from the files of other frameworks."""

import pathlib
import pickle
import sys
import types

import numpy as np
import pytest

from segjax.config import ConfigError
from segjax.pretrained import files

ARRAYS = {"a/weights": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1.5])}


def check(path):
  loaded = files.load_arrays(str(path))
  assert loaded.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(loaded[name], array)


def test_npz(tmp_path):
  np.savez(tmp_path / "w.npz", **ARRAYS)
  check(tmp_path / "w.npz")


def test_safetensors(tmp_path):
  save_file = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed").save_file
  save_file(ARRAYS, tmp_path / "w.safetensors")
  check(tmp_path / "w.safetensors")


def test_tensorflow_checkpoint_by_its_prefix_or_index(tmp_path):
  tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
  with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    variables = {name: tf.compat.v1.get_variable(name, initializer=array) for name, array in ARRAYS.items()}
    session.run(tf.compat.v1.global_variables_initializer())
    tf.compat.v1.train.Saver(variables).save(session, str(tmp_path / "model.ckpt"), global_step=30000)
  check(tmp_path / "model.ckpt-30000")
  check(tmp_path / "model.ckpt-30000.index")
  with pytest.raises(ConfigError, match="no such file. There are model.ckpt-30000.*without its .index"):
    files.load_arrays(str(tmp_path / "model.ckpt"))


@pytest.mark.parametrize("use_resource", [False, True])
def test_frozen_graph_gives_its_variables_and_no_other_constants(tmp_path, use_resource):
  tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
  with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
    variables = [
      tf.compat.v1.get_variable(name, initializer=array, use_resource=use_resource) for name, array in ARRAYS.items()
    ]
    total = tf.add_n([tf.reduce_sum(v) for v in variables]) * tf.constant(2.0, name="not_a_weight")
    session.run(tf.compat.v1.global_variables_initializer())
    frozen = tf.compat.v1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), [total.op.name])
  (tmp_path / "frozen.pb").write_bytes(frozen.SerializeToString())
  check(tmp_path / "frozen.pb")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_state": s, "cur_itrs": 7, "best_score": 0.5}])
def test_torch_state_dict_or_training_checkpoint(tmp_path, wrap):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  state = {f"module.{name}": torch.from_numpy(array) for name, array in ARRAYS.items()}
  torch.save(wrap(state), tmp_path / "w.pth")
  check(tmp_path / "w.pth")


def test_two_state_dicts_in_one_file_are_named(tmp_path):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  state = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
  torch.save({"model": state, "ema": state}, tmp_path / "w.pth")
  with pytest.raises(ConfigError, match=r"holds \['ema', 'model'\]. Save the one you mean"):
    files.load_arrays(str(tmp_path / "w.pth"))


class Malicious:
  """Runs something when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_no_file_of_weights_executes_code(tmp_path):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  ran = tmp_path / "ran"
  torch.save({"a": torch.zeros(1), "b": Malicious(ran)}, tmp_path / "w.pth")
  (tmp_path / "w.pt").write_bytes(pickle.dumps(Malicious(ran)))
  torch.save(Malicious(ran), tmp_path / "w.bin", _use_new_zipfile_serialization=False)
  np.savez(tmp_path / "w.npz", a=np.array([Malicious(ran)], dtype=object))
  for suffix in (".pth", ".pt", ".bin", ".npz"):
    with pytest.raises(ConfigError, match=rf"w\{suffix}: cannot be read"):
      files.load_arrays(str(tmp_path / f"w{suffix}"))
    assert not ran.exists(), suffix
  torch.load(tmp_path / "w.pth", weights_only=False)
  assert ran.exists()  # So it would have.


def test_bad_files_say_what_to_do(tmp_path):
  (tmp_path / "w.npz").write_bytes(b"no archive")
  (tmp_path / "w.h5").write_bytes(b"")
  for name, message in {
    "w.npz": "cannot be read as .npz.*Fetch it again",
    "w.h5": "unknown format. Known: .npz, .safetensors",
    "missing.npz": "missing.npz: no such file",
  }.items():
    with pytest.raises(ConfigError, match=message):
      files.load_arrays(str(tmp_path / name))


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
  (tmp_path / "w.safetensors").write_bytes(b"")
  with pytest.raises(ConfigError, match="reading it needs safetensors"):
    files.load_arrays(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("version, read", [("2.5.1+cu124", False), ("2.6.0", True), ("2.10.0", True), ("3.0", True)])
def test_torch_files_are_not_unpickled_by_a_torch_whose_weights_only_has_a_hole(version, read, tmp_path, monkeypatch):
  loads = []
  fake = types.SimpleNamespace(__version__=version, load=lambda *args, **options: loads.append(options) or {})
  monkeypatch.setitem(sys.modules, "torch", fake)
  (tmp_path / "w.pth").touch()
  with pytest.raises(ConfigError, match="needs one dictionary of tensors" if read else "pip install 'torch>=2.6'"):
    files.load_arrays(str(tmp_path / "w.pth"))
  assert len(loads) == read and all(options["weights_only"] for options in loads)

"""Checksums: any change of a checkpoint's files is found, named, and set aside; nothing is ever deleted."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest

from segjax import state
from segjax.config import ConfigError
from segjax.run import checkpoint
from segjax.run.checkpoint import CHECKSUMS, Checkpoints, damage, set_aside_damaged


def state_of(step):
  params = {"layer": {"kernel": jnp.arange(5000.0) * step, "bias": jnp.ones(3)}}
  return state.TrainState(jnp.int32(step), params, {}, {"momentum": params}, None, jnp.int32(-1), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("run")
  with Checkpoints(workdir, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(state_of(step), 0.1 * step)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def files(workdir, step=2):
  folder = workdir / "checkpoints" / f"step_{step}"
  return [p for p in sorted(folder.rglob("*")) if p.is_file() and (p.parent != folder or p.name == CHECKSUMS)]


def flip(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 1
  path.write_bytes(content)


def snapshot(workdir):
  return {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_a_sound_checkpoint_has_checksums_that_sha256sum_confirms(workdir):
  folder = workdir / "checkpoints" / "step_2"
  assert damage(folder) == [] and set_aside_damaged(workdir) == []
  listed = {line.split("  ")[1] for line in (folder / CHECKSUMS).read_text().splitlines()}
  assert listed == {str(p.relative_to(folder)) for p in files(workdir) if p.name != CHECKSUMS} and len(listed) >= 5
  if shutil.which("sha256sum"):
    assert subprocess.run(["sha256sum", "-c", "--quiet", CHECKSUMS], cwd=folder, check=False).returncode == 0


@pytest.mark.parametrize("change", ["first byte", "last byte", "truncated", "emptied", "removed"])
def test_any_change_of_any_file_is_found_and_named(workdir, change):
  for path in files(workdir):
    original = path.read_bytes()
    if change == "removed":
      path.unlink()
    elif change in ("truncated", "emptied"):
      path.write_bytes(original[:-1] if change == "truncated" else b"")
    else:
      flip(path, 0 if change == "first byte" else -1)
    found = damage(workdir / "checkpoints" / "step_2")
    if not (path.name == CHECKSUMS and change in ("last byte", "truncated")):  # The newline at its end says nothing.
      assert found and (path.name == CHECKSUMS or str(path) in found[0]), (path, found)
    path.write_bytes(original)


def test_what_the_checksums_leave_out_cannot_change_what_is_restored(workdir):
  folder = workdir / "checkpoints" / "step_2"
  left_out = [p for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS]
  assert {p.name for p in left_out} == {"_CHECKPOINT_METADATA", "commit_success.txt"}
  for path in left_out:
    flip(path, 0)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    restored = checkpoints.restore_variables(2)
  assert (restored["params"]["layer"]["kernel"] == jnp.arange(5000.0) * 2).all()


def test_damaged_checkpoints_are_set_aside_down_to_the_newest_sound_one(workdir):
  path = files(workdir)[-1]
  flip(path, 10)
  before = snapshot(workdir)
  (note,) = set_aside_damaged(workdir)
  assert "DAMAGED CHECKPOINT step_2" in note and str(path) in note
  after = snapshot(workdir)
  moved = {name: name for name in before} | {
    name: name.parent.__class__("damaged_checkpoints", *name.parts[1:]) for name in before if "step_2" in name.parts
  }
  assert after == {moved[name]: content for name, content in before.items()}
  with Checkpoints(workdir) as checkpoints:
    assert checkpoints.latest_step() == 1
  # The same step again, saved anew and damaged anew, does not replace the first.
  shutil.copytree(workdir / "damaged_checkpoints" / "step_2", workdir / "checkpoints" / "step_2")
  set_aside_damaged(workdir)
  assert sorted(p.name for p in (workdir / "damaged_checkpoints").iterdir()) == ["step_2", "step_2-1"]


def test_where_all_are_damaged_the_run_stops_and_nothing_changes(workdir):
  for step in (1, 2):
    flip(files(workdir, step)[1], 0)
  before = snapshot(workdir)
  with pytest.raises(ConfigError, match="Every checkpoint is damaged") as error:
    set_aside_damaged(workdir)
  assert "step_1" in str(error.value) and "step_2" in str(error.value) and "Nothing was deleted" in str(error.value)
  assert snapshot(workdir) == before


def test_scoring_a_damaged_checkpoint_names_it(workdir):
  flip(files(workdir)[1], 0)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    with pytest.raises(ConfigError, match="is not as it was written"):
      checkpoints.restore_variables(2)
    assert jax.tree.leaves(checkpoints.restore_variables(1))


def test_an_unfinished_save_is_no_checkpoint(workdir):
  folder = workdir / "checkpoints"
  (folder / "step_2").rename(folder / "step_2.orbax-checkpoint-tmp-7")
  assert set_aside_damaged(workdir) == [] and (folder / "step_2.orbax-checkpoint-tmp-7").exists()


@pytest.mark.parametrize("moment", ["before the checksums", "while they are written", "after them"])
def test_a_save_that_ends_around_its_checksums_is_no_checkpoint_and_can_be_repeated(workdir, monkeypatch, moment):
  write = checkpoint._write_checksums

  def dies(folder):
    if moment != "before the checksums":
      write(folder)
    if moment == "while they are written":
      (folder / CHECKSUMS).write_text((folder / CHECKSUMS).read_text()[:100])
    raise OSError("died")

  monkeypatch.setattr(checkpoint, "_write_checksums", dies)
  with pytest.raises(OSError, match="died"), Checkpoints(workdir, keep=3) as checkpoints:
    checkpoints.save(state_of(3))
  assert [p.name for p in (workdir / "checkpoints").glob("step_3*")] == ["step_3.orbax-checkpoint-tmp"]
  assert set_aside_damaged(workdir) == [] and checkpoint.newest_step(workdir) == 2
  monkeypatch.setattr(checkpoint, "_write_checksums", write)
  with Checkpoints(workdir, keep=3) as checkpoints:
    assert checkpoints.latest_step() == 2
    for step in (3, 4):  # The second while the first is being written.
      checkpoints.save(state_of(step))
  assert not damage(workdir / "checkpoints/step_3") and not damage(workdir / "checkpoints/step_4")
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"step_2", "step_3", "step_4"}

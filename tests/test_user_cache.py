"""The user's cache folder: nobody else's, and the only place that compiled programs come from."""

import os

import jax
import pytest

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.files import user_cache
from segjax.run import commandline


@pytest.fixture
def home(tmp_path, monkeypatch):
  """An empty cache home."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache"


def test_the_folder_is_closed_to_others_also_where_it_was_open_to_read(home):
  (home / "segjax").mkdir(parents=True)
  (home / "segjax").chmod(0o755)
  before = os.umask(0)
  try:
    assert user_cache.folder("borders") == home / "segjax/borders"
  finally:
    os.umask(before)
  assert [path.stat().st_mode & 0o777 for path in (home / "segjax", home / "segjax/borders")] == [0o700, 0o700]


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("part", ["segjax", "segjax/compilation"])
def test_a_folder_that_others_can_write_to_is_refused(home, mode, part):
  user_cache.folder("compilation")
  (home / part).chmod(mode)
  with pytest.raises(ConfigError, match=f"{part} can be written by other users.*set XDG_CACHE_HOME"):
    user_cache.folder("compilation")


def test_a_folder_or_link_of_another_user_is_refused(home, monkeypatch):
  user_cache.folder("compilation")
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  with pytest.raises(ConfigError, match=rf"segjax belongs to another user \(uid {os.getuid()}\)"):
    user_cache.folder("compilation")


def test_a_relative_or_impossible_home_is_refused(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "cache")
  with pytest.raises(ConfigError, match="'cache' is a relative path"):
    user_cache.folder("borders")
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.raises(ConfigError, match="cannot be made"):
    user_cache.folder("borders")


@pytest.fixture
def no_cache_named(monkeypatch):
  """JAX without the cache that conftest names."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_come_from_the_users_folder_and_no_config_names_another(home, no_cache_named):
  for model in config_lib.MODELS:
    assert not [name for name in config_lib.fields(config_lib.default_config(model)) if "compil" in name]
  commandline.enable_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(home / "segjax/compilation")


def test_without_a_folder_of_its_own_a_run_compiles_anew_and_says_so(home, no_cache_named, capsys):
  user_cache.folder("compilation").chmod(0o777)
  commandline.enable_compilation_cache()
  assert jax.config.jax_compilation_cache_dir is None
  assert "compiled programs are not kept" in capsys.readouterr().err


def test_the_environment_names_another_folder_or_none(home, no_cache_named):
  jax.config.update("jax_compilation_cache_dir", "/elsewhere")
  commandline.enable_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == "/elsewhere" and not home.exists()
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", False)
  commandline.enable_compilation_cache()
  jax.config.update("jax_enable_compilation_cache", True)
  assert jax.config.jax_compilation_cache_dir is None and not home.exists()

"""Weights by name and address: downloaded once, whole and checked, and used without a network afterwards."""

import concurrent.futures
import hashlib
import http.server
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from segjax import pretrained
from segjax.config import ConfigError, default_config
from segjax.pretrained import fetch, registry
from segjax.run import warm_start

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (pip install -e '.[hub]')")
ROOT = pathlib.Path(__file__).parents[1]


class Files(http.server.BaseHTTPRequestHandler):
  """Serves `content` under any name, as a CDN or the Hub does; `cut` bytes at a time where that is set."""

  content, cut, requests = b"", 0, []

  def do_HEAD(self):
    self._answer(b"", len(self.content), 200)

  def do_GET(self):
    type(self).requests.append((self.path, self.headers["Range"]))
    start = int(re.match(r"bytes=(\d+)", self.headers["Range"])[1]) if self.headers["Range"] else 0
    rest = self.content[start:]
    self._answer(rest[: self.cut or None], len(rest), 206 if start else 200, start)

  def _answer(self, body, length, code, start=0):
    self.send_response(code)
    if start:
      self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
    for name, value in (("Content-Length", length), ("ETag", '"' + "a" * 40 + '"'), ("X-Repo-Commit", "b" * 40)):
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(body)  # Less than announced, where it is cut: then the connection closes.

  def log_message(self, *_):
    pass


@pytest.fixture
def server(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  weights = tmp_path / "own.npz"
  np.savez(weights, **{"params/conv/kernel": np.arange(5000, dtype=np.float32)})
  handler = type("Handler", (Files,), dict(content=weights.read_bytes(), requests=[]))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
    running.files, running.url = handler, f"http://127.0.0.1:{running.server_port}/w/own.npz"
    running.sha256 = hashlib.sha256(handler.content).hexdigest()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def init(path, scheme="segjax"):
  config = default_config()
  config.init.path, config.init.scheme = path, scheme
  return config.init


def test_an_address_is_downloaded_once_and_then_used_without_a_network(server, capsys):
  address = f"{server.url}#sha256={server.sha256}"
  variables, origin = warm_start.load(init(address))
  np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], np.arange(5000))
  assert origin == address and f"sha256={server.sha256}" in capsys.readouterr().out
  server.shutdown()
  server.server_close()
  assert warm_start.load(init(address))[1] == address and len(server.files.requests) == 1


def test_a_cut_transfer_goes_on_where_it_was(server, monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB: what is lost of it at most.
  server.files.cut = 9000
  path, _ = fetch.local_file(server.url, "segjax")
  assert pathlib.Path(path).read_bytes() == server.files.content
  assert [ranges for _, ranges in server.files.requests][1:2] == ["bytes=9000-"]


def test_what_an_earlier_process_began_is_continued(server):
  whole, _ = fetch.local_file(server.url, "")
  whole = pathlib.Path(whole)
  (whole.parent / f"{whole.name}.part").write_bytes(server.files.content[:7000])
  whole.unlink()
  fetch.local_file(server.url, "")
  assert whole.read_bytes() == server.files.content and server.files.requests[-1][1] == "bytes=7000-"


def test_other_content_is_refused_and_removed_and_a_damaged_file_fetched_again(server):
  with pytest.raises(ConfigError, match=f"SHA-256 {server.sha256}, not 00000000..., which was removed"):
    fetch.local_file(f"{server.url}#sha256=00000000", "")
  address = f"{server.url}#sha256={server.sha256[:8]}"
  path = pathlib.Path(fetch.local_file(address, "")[0])
  path.write_bytes(b"damaged")
  assert pathlib.Path(fetch.local_file(address, "")[0]).read_bytes() == server.files.content
  assert not list(path.parent.glob("*.part"))
  with pytest.raises(ConfigError, match="8 to 64 hexadecimal digits"):
    fetch.local_file(f"{server.url}#md5=0", "")


@pytest.mark.full  # The library tries five seconds long.
def test_without_a_network_the_error_says_where_to_put_the_file(server):
  server.shutdown()
  server.server_close()
  with pytest.raises(ConfigError, match=r"cannot be downloaded .* or put it at (.*own\.npz)\.$") as error:
    fetch.local_file(server.url, "")
  place = pathlib.Path(re.search(r"put it at (.*)\.$", str(error.value))[1])
  place.write_bytes(server.files.content)
  assert fetch.local_file(server.url, "") == (str(place), "")


def test_two_at_once_download_once(server):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    paths = set(pool.map(lambda _: fetch.local_file(server.url, ""), range(2)))
  assert len(paths) == 1 and len(server.files.requests) == 1


def test_a_name_of_the_registry_brings_its_scheme(server, monkeypatch):
  entry = registry.Entry(server.url, server.sha256[:8], "segjax", "", "", "")
  monkeypatch.setitem(registry.REGISTRY, "torchvision/own", entry)
  assert warm_start.load(init("torchvision/own", ""))[1] == "torchvision/own"
  with pytest.raises(ConfigError, match="has the names of segjax. Leave the scheme empty"):
    fetch.local_file("torchvision/own", "timm")
  with pytest.raises(ConfigError, match="Did you mean torchvision/resnet50"):
    fetch.local_file("torchvision/resnet5", "")


def test_a_file_of_the_hub_comes_from_its_library(server, tmp_path):
  code = "import sys; from segjax.pretrained import fetch; print(fetch.local_file(sys.argv[1], '')[0])"
  environment = os.environ | dict(HF_ENDPOINT=server.url.rpartition("/w/")[0], HF_HOME=str(tmp_path / "hub"))
  for offline in ("0", "1"):
    command = [sys.executable, "-c", code, "hf://owner/name@v1/own.npz"]
    done = subprocess.run(
      command, env=environment | dict(HF_HUB_OFFLINE=offline), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip().splitlines()[-1]).read_bytes() == server.files.content
  with pytest.raises(ConfigError, match="write hf://OWNER/REPOSITORY/FILE"):
    fetch.local_file("hf://owner", "")


def test_the_registry_is_sound_and_documented():
  assert registry.table() in (ROOT / "docs/weights.md").read_text()
  for name, entry in registry.REGISTRY.items():
    assert entry.url.startswith("https://") and re.fullmatch("[0-9a-f]{8,64}", entry.sha256) and entry.score
    assert entry.scheme in pretrained.SCHEMES and name.startswith(entry.scheme)
    built = re.search(r"build\('(.*)'\)", entry.network)
    assert not built or built[1] in pretrained.PEERS

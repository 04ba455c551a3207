"""Exports: each format computes what evaluation does, without segjax; what differs or cannot be made leaves nothing."""

import base64
import http.server
import json
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.request

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from segjax import predict
from segjax.config import ConfigError
from segjax.experiment import Experiment
from segjax.run import warm_start
from segjax.tools import export
from segjax.tools.exports import formats
from tests import command
from tests.marks import full
from tests.untrained_run import make_config, make_data, make_run, smooth

ROOT = pathlib.Path(__file__).parents[1]
LIBRARIES = {"onnx": "jax2onnx", "litert": "tensorflow"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  """(config, workdir) of a U-Net of three classes."""
  config = make_config(data)
  return config, make_run(config, tmp_path_factory.mktemp("run") / "mine")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  out = tmp_path_factory.mktemp("export") / "EXPORT"
  export.export(*run, out, ["stablehlo", "safetensors"], "cc0-1.0")
  return out


NETWORKS = {
  "unet": dict(width=4, depth=2),
  "sigmoid": dict(width=4, depth=2),
  "deeplab_v3plus": dict(backbone="mobilenet_v2", depth_multiplier=0.35),
  "fcn": dict(width=4),
}


@pytest.mark.parametrize(
  "network, format",
  [("sigmoid", "stablehlo"), ("unet", "onnx")]
  + full(
    ("deeplab_v3plus", "stablehlo"), ("fcn", "stablehlo"), ("sigmoid", "onnx"), ("deeplab_v3plus", "onnx"), ("fcn", "onnx"),
    ("unet", "litert"), ("sigmoid", "litert"), ("deeplab_v3plus", "litert"), ("fcn", "litert"),
  ),
)  # fmt: skip
def test_a_file_computes_what_evaluation_does(network, format, data, tmp_path, capsys):
  if format in LIBRARIES:
    pytest.importorskip(LIBRARIES[format], reason=f"{LIBRARIES[format]} is not installed, see docs/serving.md")
  sigmoid = network == "sigmoid"
  name = "unet" if sigmoid else network
  config = make_config(data, name, classes=2 if sigmoid or name == "deeplab_v3plus" else 3, **NETWORKS[network])
  if sigmoid:
    config.head, config.loss.terms = "sigmoid", ("bce",)
  export.export(config, make_run(config, tmp_path / "run"), tmp_path / "out", [format], "")
  said = capsys.readouterr().out
  assert "on 4 images of val." in said and float(re.search(r"within (\S+) of|bit for bit()", said)[1] or 0) < 1e-4
  assert (tmp_path / "out" / formats.FORMATS[format].file).stat().st_size > 1000


def test_one_file_takes_images_of_any_size_in_any_batch(run, exported):
  network = jax.export.deserialize(bytearray((exported / "model.stablehlo").read_bytes()))
  assert set(network.platforms) == {"cpu", "cuda", "tpu"}
  program, _ = export.load(*run)
  for size, count in (((48, 64), 1), ((20, 31), 3)):
    images = np.stack([smooth(10 + n, size) for n in range(count)])
    ids, probabilities = network.call(images)
    for n in range(count):
      expected, likely = program.evaluated(images[n])
      np.testing.assert_allclose(probabilities[n], likely, atol=1e-5)
      assert (np.asarray(ids[n]) == expected).mean() > 0.999
  with pytest.raises(ValueError):
    network.call(np.zeros((1, 49, 64, 3), np.uint8))


def test_weights_come_back_by_init_path_bit_for_bit(run, exported, tmp_path):
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.init.path, config.init.scheme = str(exported / "model.safetensors"), "segjax"
  mine, theirs = (
    Experiment(config).trained_variables(place, warm_start.load_unless_run(config, place))[0]
    for place in (None, workdir)
  )
  jax.tree.map(np.testing.assert_array_equal, mine, theirs)
  assert {name.partition("/")[0] for name in load_file(exported / "model.safetensors")} == {"params", "batch_stats"}
  assert not predict.predict(config, None, [config.data.dir + "/images"], tmp_path / "out")
  (tmp_path / "other.npz").write_bytes(b"")
  np.savez(tmp_path / "other.npz", weight=np.zeros(3))
  config.init.path = str(tmp_path / "other.npz")
  with pytest.raises(ConfigError, match="names that are not segjax' own: weight"):
    warm_start.load(config.init)


def test_the_model_card_says_what_the_network_is(exported):
  text = (exported / "model_card.md").read_text()
  header = text.split("---\n")[1]
  assert "license: cc0-1.0" in header and "pipeline_tag: image-segmentation" in header
  assert "any size up to 48x64" in text and "| 2 | c | #" in text and "Not evaluated." in text
  assert '"model.width": 4' in text and "data.dir" not in text and "init.scheme=segjax" in text
  assert re.search(r"exported 20\d\d-.* by `.*`, segjax \d", text)
  assert (exported / "classes.txt").read_text() == "a\nb\nc\n"


def test_a_file_that_computes_something_else_is_refused_and_nothing_is_left(run, tmp_path, monkeypatch):
  whole = formats.FORMATS["stablehlo"]

  def shifted(path, program):
    network = whole.load(path, program)
    return lambda image: (network(image)[0], network(image)[1] + 0.002)

  monkeypatch.setitem(formats.FORMATS, "stablehlo", whole._replace(load=shifted))
  with pytest.raises(ConfigError, match="differ from segjax' own by up to 0.002, more than 0.001"):
    export.export(*run, tmp_path / "out", ["stablehlo"], "")
  assert not list(tmp_path.iterdir())


def test_mistakes_are_named_before_anything_is_loaded(run, tmp_path, monkeypatch):
  config, workdir = run
  for formats_, out, words in (
    (["onx"], tmp_path / "a", "no such format. Did you mean onnx?"),
    (["onnx"], workdir, "is there already"),
  ):
    with pytest.raises(ConfigError, match=re.escape(words)):
      export.export(config, workdir, out, formats_, "")
  for words, message in (
    ((f"--workdir={workdir}",), "--out=DIR"),
    (("--out=x", "--config=quickstart"), "Name a run"),
    ((f"--workdir={workdir}", "--out=x", "--push=owner/name"), "write hf://OWNER/NAME"),
  ):
    code, _, err = command.run("segjax.export", *words, cwd=tmp_path)
    assert code and message in err
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  with pytest.raises(ConfigError, match="pip install onnx .* --no-deps jax2onnx"):
    export.export(config, workdir, tmp_path / "b", ["onnx"], "")
  assert not list(tmp_path.iterdir())


def test_a_run_is_named_by_its_folder_alone(run, tmp_path):
  code, out, err = command.run("segjax.export", run[1], f"--out={tmp_path}/out", "--format=safetensors")
  assert code == 0, err
  assert "bit for bit" in out and (tmp_path / "out/model_card.md").is_file()


def _blocks():
  return re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs/serving.md").read_text())


def _in_a_process_without_segjax(code, folder):
  blocked = "import sys\nsys.modules['segjax'] = sys.modules['flax'] = None\n"
  return subprocess.Popen([sys.executable, "-c", blocked + code], cwd=folder, stderr=subprocess.PIPE, text=True)


def test_the_documented_server_serves_without_segjax(run, exported):
  with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as free:
    port = free.server_port
  server = _in_a_process_without_segjax(_blocks()[0].replace("8000", str(port)), exported.parent)
  try:
    image = smooth(3, (30, 40))
    answer = _post(f"http://127.0.0.1:{port}", image, server)
  finally:
    server.kill()
    server.communicate()
  program, _ = export.load(*run)
  assert (answer == program.evaluated(image)[0]).mean() > 0.999 and len(np.unique(answer)) > 1


def _post(address, image, server):
  import io

  content = io.BytesIO()
  np.save(content, image)
  for _ in range(300):
    try:
      return np.load(io.BytesIO(urllib.request.urlopen(address, content.getvalue(), timeout=60).read()))
    except urllib.error.URLError:
      assert server.poll() is None, server.stderr.read()
      time.sleep(0.2)
  raise TimeoutError


@pytest.mark.full
def test_the_documented_onnx_network_runs_without_segjax(data, tmp_path):
  pytest.importorskip("jax2onnx", reason="jax2onnx is not installed, see docs/serving.md")
  config = make_config(data)
  workdir, image = make_run(config, tmp_path / "run"), smooth(3, (30, 40))
  export.export(config, workdir, tmp_path / "EXPORT", ["onnx"], "")
  np.save(tmp_path / "image.npy", image)
  code = _blocks()[1] + "\nnp.savez('out.npz', *network(np.load('image.npy')))\n"
  assert _in_a_process_without_segjax(code, tmp_path).communicate()[1] is not None
  ids, probabilities = np.load(tmp_path / "out.npz").values()
  expected, likely = export.load(config, workdir)[0].evaluated(image)
  np.testing.assert_allclose(probabilities, likely, atol=1e-4)
  assert (ids == expected).mean() > 0.999


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the Hub as takes small files; `received` has them."""

  received: dict[str, bytes] = {}

  def do_POST(self):
    content = self.rfile.read(int(self.headers["Content-Length"]))
    if self.path.endswith("/repos/create"):
      name = json.loads(content)["organization"] + "/" + json.loads(content)["name"]
      answer = dict(url=f"{self.server.address}/{name}", id="1", name=name)
    elif "/preupload/" in self.path:
      files = json.loads(content)["files"]
      answer = dict(files=[dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in files])
    elif "/validate-yaml" in self.path:
      answer = dict(errors=[], warnings=[])
    else:
      for line in map(json.loads, content.splitlines()):
        if line["key"] == "file":
          self.received[self.path + ":" + line["value"]["path"]] = base64.b64decode(line["value"]["content"])
      answer = dict(commitUrl=f"{self.server.address}/o/n/commit/1", commitOid="1", success=True)
    self._answer(answer)

  def do_GET(self):
    self._answer(dict(id="owner/mine", sha="0" * 40, siblings=[], tags=[], private=False, downloads=0))

  def _answer(self, content):
    body = json.dumps(content).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


def test_an_export_is_pushed_to_the_hub(exported, monkeypatch, capsys):
  hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (pip install '.[hub]')")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    whole = hub.HfApi
    monkeypatch.setattr(hub, "HfApi", lambda: whole(endpoint=server.address, token="hf_of_nobody"))
    export.push(exported, "hf://owner/mine")
    server.shutdown()
  assert "pushed: hf://owner/mine" in capsys.readouterr().out
  received = {path.rpartition(":")[2]: content for path, content in Hub.received.items()}
  assert set(received) == {"README.md", "model_card.md", "classes.txt", "model.stablehlo", "model.safetensors"}
  assert received["README.md"] == (exported / "model_card.md").read_bytes()
  monkeypatch.setattr(hub, "HfApi", lambda: whole(endpoint="http://127.0.0.1:1", token="hf_of_nobody"))
  with pytest.raises(ConfigError, match="The export stays in"):
    export.push(exported, "hf://owner/mine")

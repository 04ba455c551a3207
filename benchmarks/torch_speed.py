"""The PyTorch side of python -m segjax.benchmark --compare=torch: a process that runs steps when told to.

Its one argument is JSON: network and options (of `torch_networks.NETWORKS`), num_classes, batch_size, size (H, W), dtype.
Then each line of stdin, "KIND FORM COUNT", is answered by a line of JSON with the seconds of COUNT steps. KIND is train
(forward, loss, backward, SGD with momentum) or eval (forward, argmax); FORM is one of FORMS. A first step in a form, which
may compile, is made beforehand and not counted.

Beside segjax's step, that of training lacks: augmentation, weight decay by kind, the check for NaN, pixel accuracy.
"""

import contextlib
import json
import sys
import time

import torch
import torch_networks
from torch.nn import functional

# Memory format, and whether torch.compile is used.
FORMS = {
  "nchw": (torch.contiguous_format, False),
  "channels_last": (torch.channels_last, False),
  "compiled": (torch.contiguous_format, True),
  "compiled_channels_last": (torch.channels_last, True),
}


class Steps:
  """A network in one form and a batch of noise, both on the device; call it to run a step to its end."""

  def __init__(self, spec: dict, kind: str, form: str):
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    memory_format, compiled = FORMS[form]
    constructor, _ = torch_networks.NETWORKS[spec["network"]]
    torch.manual_seed(0)
    network = constructor(spec["num_classes"], **spec["options"]).to(self.device, memory_format=memory_format)
    self.network = network.train(kind == "train")
    self.optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    shape = (spec["batch_size"], 3, *spec["size"])
    self.image = torch.randn(shape, device=self.device).to(memory_format=memory_format)
    self.label = torch.randint(0, spec["num_classes"], (shape[0], *shape[2:]), device=self.device)
    self.low = spec["dtype"] == "bfloat16"
    step = self.train if kind == "train" else self.evaluate
    self.step = torch.compile(step) if compiled else step

  def forward(self):
    """Logits and their loss; bfloat16 by autocast."""
    with torch.autocast(self.device, torch.bfloat16) if self.low else contextlib.nullcontext():
      return self.network(self.image)

  def train(self):
    self.optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(self.forward().float(), self.label, ignore_index=255)
    loss.backward()
    self.optimizer.step()
    return loss

  def evaluate(self):
    with torch.no_grad():
      return self.forward().argmax(1)

  def __call__(self):
    self.step().sum().item()  # Waits for the device.


def main():
  spec = json.loads(sys.argv[1])
  torch.backends.cudnn.benchmark = True
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # As XLA does by default.
  print(json.dumps(dict(torch=torch.__version__, threads=torch.get_num_threads())), flush=True)
  key, steps = None, None
  for line in sys.stdin:
    kind, form, count = line.split()
    if key != (kind, form):
      steps = None  # Frees its memory first.
      key, steps = (kind, form), Steps(spec, kind, form)
      steps()
    seconds = []
    for _ in range(int(count)):
      start = time.perf_counter()
      steps()
      seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
  main()

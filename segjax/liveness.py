"""Notice of a process that dies among several: at once, by name, and to all.

The runtime's own heartbeat notices within `distributed.HEARTBEAT_TIMEOUT`, and then aborts with a C++ trace. Beside it,
every process keeps a connection to process 0, which the kernel closes when a process ends, however it ends. What the
kernel cannot tell (a host without power, a cut cable) remains the heartbeat's.
"""

import os
import socket
import sys
import threading

_BYE = b"bye\n"  # The last line of a process that ends as it should.


class Listener:
  """Process 0's end: hears of each process that goes without a good-bye, tells the others, and ends its own process.

  Args:
    count: how many others there are.
  """

  def __init__(self, count: int):
    self._server = socket.create_server(("", 0), backlog=count)
    self.port = self._server.getsockname()[1]
    self._count, self._peers, self._ending = count, [], threading.Lock()

  def accept(self) -> None:
    """Waits for all others to connect, then watches them."""
    self._server.settimeout(60)
    for _ in range(self._count):
      peer = self._server.accept()[0]
      peer.settimeout(None)
      name = peer.makefile().readline().strip()
      self._peers.append(peer)
      threading.Thread(target=self._watch, args=(peer, name), name="segjax-peer", daemon=True).start()
    self._server.close()

  def _watch(self, peer: socket.socket, name: str) -> None:
    if _read(peer).endswith(_BYE):
      return
    with self._ending:  # The first to go is the cause; the others follow from it.
      _send(self._peers, f"{name} is gone".encode())
      _end(f"{name} is gone")

  def close(self) -> None:
    """Says good-bye."""
    _send(self._peers, _BYE)


class Watcher:
  """Any other process's end.

  Args:
    host, port: of process 0's `Listener`.
    name: of this process, for messages.
  """

  def __init__(self, host: str, port: int, name: str):
    self._peer = socket.create_connection((host, port), timeout=60)
    self._peer.settimeout(None)
    self._peer.sendall(f"{name}\n".encode())
    threading.Thread(target=self._watch, name="segjax-peer", daemon=True).start()

  def _watch(self) -> None:
    heard = _read(self._peer)
    if not heard.endswith(_BYE):
      _end(heard.decode() or "process 0 is gone")

  def close(self) -> None:
    """Says good-bye."""
    _send([self._peer], _BYE)


def _read(peer: socket.socket) -> bytes:
  """Everything up to the other side's end, good or bad."""
  heard = b""
  try:
    while not heard.endswith(_BYE) and (part := peer.recv(4096)):
      heard += part
  except OSError:
    pass
  return heard


def _send(peers: list[socket.socket], message: bytes) -> None:
  for peer in peers:
    try:
      peer.sendall(message)
    except OSError:
      pass  # It is gone as well.


def _end(reason: str):
  try:
    print(
      f"segjax: {reason}: it was killed, or its own output has the reason. All processes stop; start them all again, and"
      " the run resumes from its last checkpoint.",
      file=sys.stderr, flush=True,
    )  # fmt: skip
  finally:
    os._exit(1)  # The main thread may wait for a computation that will never end.

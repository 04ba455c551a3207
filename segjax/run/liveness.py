"""Notice of a process that dies among several: at once, by name, and to all.

The runtime's own heartbeat notices within `distributed.HEARTBEAT_TIMEOUT`, and then aborts with a C++ trace. Beside it,
every process keeps a connection to process 0, which the kernel closes when a process ends, however it ends. What the
kernel cannot tell (a host without power, a cut cable) remains the heartbeat's.
"""

import hmac
import os
import socket
import sys
import threading
import time

_BYE = b"bye\n"  # The last line of a process that ends as it should.
_PATIENCE = 60  # Seconds to wait for all others, and for what each has to say first.


class Listener:
  """Process 0's end: hears of each process that goes without a good-bye, tells the others, and ends its own process.

  Args:
    count: how many others there are.
    token: what only they know; anybody else's connection is closed, and one that says nothing holds up none.
  """

  def __init__(self, count: int, token: str):
    self._server = socket.create_server(("", 0), backlog=count + 16)
    self.port = self._server.getsockname()[1]
    self._count, self._token = count, token
    self._peers, self._joining, self._ending = [], threading.Lock(), threading.Lock()

  def accept(self) -> None:
    """Waits for all others to connect, and watches them from then on.

    Raises:
      OSError: some did not come in time.
    """
    deadline = time.monotonic() + _PATIENCE
    self._server.settimeout(0.1)
    with self._server:
      while len(self._peers) < self._count:
        try:
          peer = self._server.accept()[0]
        except TimeoutError:
          if time.monotonic() > deadline:
            raise TimeoutError(f"{self._count - len(self._peers)} of {self._count} processes did not connect") from None
        else:
          threading.Thread(target=self._greet, args=(peer,), name="segjax-peer", daemon=True).start()

  def _greet(self, peer: socket.socket) -> None:
    peer.settimeout(_PATIENCE)
    token, _, name = _read(peer, b"\n", limit=1024).decode(errors="replace").rstrip("\n").partition(" ")
    if not hmac.compare_digest(token.encode(), self._token.encode()):
      peer.close()
      return
    peer.settimeout(None)
    with self._joining:
      self._peers.append(peer)
    self._watch(peer, name)

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
    host, port, token: of process 0's `Listener`.
    name: of this process, for messages.
  """

  def __init__(self, host: str, port: int, token: str, name: str):
    self._peer = socket.create_connection((host, port), timeout=_PATIENCE)
    self._peer.settimeout(None)
    self._peer.sendall(f"{token} {name}\n".encode())
    threading.Thread(target=self._watch, name="segjax-peer", daemon=True).start()

  def _watch(self) -> None:
    heard = _read(self._peer)
    if not heard.endswith(_BYE):
      _end(heard.decode() or "process 0 is gone")

  def close(self) -> None:
    """Says good-bye."""
    _send([self._peer], _BYE)


def _read(peer: socket.socket, last: bytes = _BYE, limit: int = 2**16) -> bytes:
  """Everything up to `last`, or to the other side's end, good or bad."""
  heard = b""
  try:
    # Byte by byte, as what follows `last` is for the next reader.
    while not heard.endswith(last) and len(heard) < limit and (part := peer.recv(1)):
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

"""Who may join process 0's watch: the run's own processes, whatever else connects to its port."""

import socket
import threading
import time

import pytest

from segjax.run import liveness


def test_only_who_knows_the_token_joins_and_a_silent_client_holds_up_nobody():
  listener = liveness.Listener(2, "secret")
  silent = socket.create_connection(("127.0.0.1", listener.port))
  stranger = socket.create_connection(("127.0.0.1", listener.port))
  stranger.sendall(b"guess process 1\n")
  accepting = threading.Thread(target=listener.accept)
  begin = time.monotonic()
  accepting.start()
  watchers = [liveness.Watcher("127.0.0.1", listener.port, "secret", f"process {i}") for i in (1, 2)]
  accepting.join(timeout=20)
  assert not accepting.is_alive() and time.monotonic() - begin < 20 and len(listener._peers) == 2
  stranger.settimeout(10)
  assert stranger.recv(1) == b""  # Closed, and its end ended nobody.
  with pytest.raises(OSError):
    socket.create_connection(("127.0.0.1", listener.port), timeout=2)
  silent.close()
  for link in (*watchers, listener):
    link.close()


def test_processes_that_do_not_come_are_an_error_in_time(monkeypatch):
  monkeypatch.setattr(liveness, "_PATIENCE", 0.2)
  with pytest.raises(OSError, match="1 of 1 processes did not connect"):
    liveness.Listener(1, "secret").accept()

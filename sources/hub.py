"""Is the model hub within reach? Its own library takes half a minute to find out; a user should wait two seconds."""
from __future__ import annotations

import os
import socket
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

WAIT = 2.0  # seconds


def within_reach(address: str = "") -> bool:
    """True if an address, or the proxy in front of it, takes a connection within WAIT seconds.

    Without an address it is the hub's: HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 says that there is none.
    """
    if not address and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    to = urlsplit(address or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = {} if proxy_bypass(to.hostname or "") else getproxies()
    proxy = proxies.get(to.scheme) or proxies.get("all")
    at = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else to
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((at.hostname, at.port or (80 if at.scheme == "http" else 443)), WAIT).close()
            answers.append(True)
        except OSError:
            pass

    knock = Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    knock.start()
    knock.join(WAIT)
    return bool(answers)


def options(name: str) -> dict:
    """Keyword arguments for any `from_pretrained(name)`: never run code that comes with a model, and look only at
    this machine's files if `name` is a folder or the hub is out of reach."""
    return {"trust_remote_code": False, "local_files_only": Path(name).is_dir() or not within_reach()}

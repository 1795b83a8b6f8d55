"""The model hub: whether it can be reached, how models are loaded from it, and what to say if they cannot be.

Its own library takes half a minute to find out that there is no network; a user should wait two seconds.
"""
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from sources.files import BadInput, explained

WAIT = 2.0  # seconds
SIZES = {"bert-base-uncased": "440 MB", "openai/clip-vit-base-patch32": "605 MB"}  # of the weights of our defaults


def endpoint() -> str:
    """The address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def within_reach(address: str = "") -> bool:
    """True if an address, or the proxy in front of it, takes a connection within WAIT seconds.

    Without an address it is the hub's: HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 says that there is none. Raises
    BadInput if HF_ENDPOINT is no address.
    """
    if not address and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if not address:
        address = endpoint()
        with explained("HF_ENDPOINT", "an address such as https://huggingface.co"):
            found = urlsplit(address)
            if found.scheme not in ("http", "https") or not found.hostname or found.port == 0:
                raise ValueError(f"found {address}")
    answers: list[bool] = []

    def knock(place: tuple) -> None:
        with suppress(OSError):
            socket.create_connection(place, WAIT).close()
            answers.append(True)

    def connect() -> None:
        try:
            to = urlsplit(address)
            proxies = {} if proxy_bypass(to.hostname or "") else getproxies()
            proxy = proxies.get(to.scheme) or proxies.get("all")
            at = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else to
            port = at.port or (80 if at.scheme == "http" else 443)
            found = {place[:2] for *_, place in socket.getaddrinfo(at.hostname, port, type=socket.SOCK_STREAM)}
        except (OSError, ValueError):  # not an address
            return
        doors = [Thread(target=knock, args=(place,), daemon=True) for place in found]  # one may be of a dead network
        for door in doors:
            door.start()
        while not answers and any(door.is_alive() for door in doors):
            time.sleep(0.01)

    search = Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    search.start()
    search.join(WAIT)
    return bool(answers)


def options(name: str) -> dict:
    """Keyword arguments for any `from_pretrained(name)`: never run code that comes with a model, and look only at
    this machine's files if `name` is a folder or the hub is out of reach.

    Also keeps transformers from reporting at length. The hub's own bar shows how a download goes.
    """
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    bars = not are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # also the hub's
    if bars:
        enable_progress_bars()
    return {"trust_remote_code": False, "local_files_only": Path(name).is_dir() or not within_reach()}


def cannot_load(what: str, name: str, files: str, flag: str, offline: bool, error: Exception) -> BadInput:
    """The error for a model that could not be loaded, with what is to be done.

    what: its part here, such as "text encoder". files: which ones it consists of. flag: the one that takes its folder.
    offline: whether the hub is out of reach. error: what the library said.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    failed = f"{flag} {name}: cannot load the {what}"
    if Path(name).is_dir():
        return BadInput(f"{failed}: expected a folder with {files} ({reason})")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):  # a repository of the hub has at most one slash
        return BadInput(f"{failed}: no such folder, expected one with {files}")
    size = f" (about {SIZES[name]})" if name in SIZES else ""
    why = f"{endpoint()} cannot be reached" if offline else f"{endpoint()} does not give it ({reason})"
    return BadInput(f"{failed}: it is not a folder here, and {why}. Fetch {files}{size} from "
                    f"{endpoint()}/{name}/tree/main on another machine, put them into one folder, and give that folder "
                    f"to {flag}")

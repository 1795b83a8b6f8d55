"""One file from one address: carried by the hub's library or by PyTorch's, and checked by its size and its hash."""
import errno
import hashlib
import re
import socket
from pathlib import Path
from typing import NamedTuple

from sources import hub
from sources.files import BadInput

HUB = f"{hub.endpoint()}/datasets"
FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system calls a full disk


class Address(NamedTuple):
    url: str
    size: int  # bytes, about
    hash: str = ""  # SHA-256 (64 digits) or MD5 (32 digits) of the file; "" if it is not known

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def download(address: Address, path: Path, quiet: bool = False) -> None:
    """Fetch a file. It gets its name when it is complete.

    Raises BadInput, with what to do, if that fails, and OSError if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if address.url.startswith(HUB):
            import huggingface_hub

            if quiet:
                huggingface_hub.utils.disable_progress_bars()
            repository, commit = re.match(f"{re.escape(HUB)}/(.+?)/resolve/(.+?)/", address.url).groups()
            huggingface_hub.hf_hub_download(repository, address.name, repo_type="dataset", revision=commit,
                                            local_dir=path.parent)
        else:
            from_url(address.url, path, progress=not quiet)
    except Exception as error:  # the libraries raise many kinds
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise BadInput(reason(error, address.url)) from error


def from_url(url: str, path: Path, **options) -> None:
    """`torch.hub.download_url_to_file` with its options, but it gives up on a server that is silent for a minute."""
    import torch

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        torch.hub.download_url_to_file(url, str(path), **options)
    finally:
        socket.setdefaulttimeout(before)


def reason(error: Exception, url: str) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (f"you have to agree to its terms first: log in at {url.split('/resolve/')[0]}, agree there, and run "
                "`hf auth login` here")
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such dataset any more, or it is private"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "no answer"
    if isinstance(error, errors.EntryNotFoundError | errors.RevisionNotFoundError):
        return "the dataset has no such file any more"
    return f"the transfer failed: {(str(error).splitlines() or [type(error).__name__])[0]}"


def check(path: Path, address: Address) -> None:
    """Raises BadInput if a file has another size or another hash than it should have."""
    size = path.stat().st_size
    if abs(size - address.size) > address.size / 10:
        raise BadInput(f"the file has {size:,} bytes, expected about {address.size:,}")
    if address.hash:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256" if len(address.hash) == 64 else "md5").hexdigest()
        if found != address.hash:
            raise BadInput(f"the file is damaged or another one: its hash is {found}, expected {address.hash}")

"""What a file written by torch.save says of its own bytes: the name, size and CRC-32 of each record.

Such a file is a zip, stored as it is. One record describes all objects, and each storage of tensors is one. Two thirds
of what an optimizer saves are of no use to whoever wants the weights: with the list of records, which the manifest
has the hash of, the weights alone are read and compared.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch
from torch import Tensor

STORAGES = "data"  # the folder of storages' records; all others are small
THREADS = 8
# What zipfile raises for lists and headers that are damaged, besides OSError.
DAMAGE = (BadZipFile, EOFError, NotImplementedError, OverflowError, UnicodeDecodeError, struct.error)


def records_sha256(path: Path) -> str:
    """The hash of a file's list of records, from there to its end. Raises ValueError if there is none."""
    with _zip_of(path) as listed, path.open("rb") as file:
        file.seek(listed.start_dir)
        return hashlib.sha256(file.read()).hexdigest()


def check_descriptions(path: Path) -> None:
    """Compare all records but those of storages. Raises ValueError if one differs from its CRC-32.

    The list of records is to be compared before.
    """
    with _zip_of(path) as file:
        for record in file.infolist():
            if Path(record.filename).parent.name != STORAGES:
                try:
                    file.read(record)
                except DAMAGE as error:
                    raise ValueError(f"{path.name}: its record {record.filename} is damaged ({error})") from error


@contextmanager
def checking_storages(tensors: Iterable[Tensor], folder: Path) -> Iterator[None]:
    """During the block, compare the bytes of tensors that were mapped from files in `folder` with those files' records.

    Raises ValueError if the bytes of a storage are those of no record, by size and CRC-32, whatever the block raised.
    """
    recorded = {(record.file_size, record.CRC) for path in folder.rglob("*.pt") for record in _records(path)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    largest_first = sorted(storages.values(), key=lambda storage: -storage.nbytes())
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(_crc, largest_first)
        try:
            yield
        finally:
            for storage, found in zip(largest_first, sums, strict=True):
                if (storage.nbytes(), found) not in recorded:
                    raise ValueError(
                        f"{storage.nbytes()} bytes of weights in {folder.name} differ from their CRC-32 "
                        f"(it is {found:08x})"
                    )


def check_storages(tensors: Iterable[Tensor], folder: Path) -> None:
    """`checking_storages` with nothing else to do."""
    with checking_storages(tensors, folder):
        pass


def _records(path: Path) -> list[ZipInfo]:
    """None of what is no file of torch's: a storage that is not recorded elsewhere was not read from it."""
    try:
        with _zip_of(path) as file:
            return file.infolist()
    except (OSError, ValueError):
        return []


def _zip_of(path: Path) -> ZipFile:
    try:
        return ZipFile(path)
    except DAMAGE as error:
        raise ValueError(f"{path.name} is no whole file of torch's ({error})") from error


def _crc(storage: torch.UntypedStorage) -> int:
    return zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)

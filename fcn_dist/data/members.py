"""Member records: where in its tar each sample of a shard lies, so that any sample is read directly.

Beside each `NAME.tar` lies `NAME.members.npy`, one record a sample. Kept there, and not in the index, they grow with
the shard and not with the data set.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcn_dist.errors import UserError


def member_dtype(key_bytes: int) -> np.dtype[np.void]:
    """The record of one sample: key, byte ranges of both payloads in the tar with their CRC-32, and size.

    `key_bytes` is the length of the longest key of the shard in UTF-8.
    """
    return np.dtype(
        [
            ("key", f"S{key_bytes}"),
            ("image_offset", "<u8"),
            ("image_size", "<u4"),
            ("image_crc32", "<u4"),
            ("mask_offset", "<u8"),
            ("mask_size", "<u4"),
            ("mask_crc32", "<u4"),
            ("height", "<u4"),
            ("width", "<u4"),
        ]
    )


def members_path(shard_path: Path) -> Path:
    """`x/training-000000.tar` -> `x/training-000000.members.npy`."""
    return shard_path.with_suffix(".members.npy")


def parse_members(data: bytes, name: str, num_samples: int) -> "NDArray[np.void]":
    """The records in `data`, the contents of file `name`; UserError unless there are `num_samples` of them."""
    try:
        members: NDArray[np.void] = np.load(BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise UserError(f"{name} cannot be read ({error}); restore it, or pack the scenes again") from error
    key_bytes = members.dtype["key"].itemsize if "key" in (members.dtype.names or ()) else 1
    if members.dtype != member_dtype(key_bytes) or members.shape != (num_samples,):
        raise UserError(
            f"{name} has records of shape {members.shape} and fields {members.dtype.names}; {num_samples} records of "
            f"{member_dtype(1).names} are needed; restore it, or pack the scenes again"
        )
    return members


def member_key(record: "np.void") -> str:
    """The sample's key; what is no UTF-8 in a damaged or hostile record is replaced, for it is only ever shown."""
    return bytes(record["key"]).decode(errors="replace")

"""The chained hash that names a prefix of tokens: prefill caches blocks under it, gateways route by
it.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence

HASH_BYTES = 16
_TOKEN_BYTES = 4


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """One hash per full block of `block_size` tokens; hash i stands for the salt and all tokens up
    to its end.

    blake2b-128 over the previous hash (the first block: the hash of the salt) and the block's token
    ids as little-endian int32. Equal hashes mean equal prefixes: nobody can make two that collide.
    """
    tokens = array("i", token_ids)
    assert tokens.itemsize == _TOKEN_BYTES
    if sys.byteorder == "big":
        tokens.byteswap()
    view = memoryview(tokens).cast("B")
    block_bytes = block_size * _TOKEN_BYTES
    parent = hashlib.blake2b(
        salt.encode(), digest_size=HASH_BYTES, person=b"scission prefix"
    ).digest()
    hashes: list[bytes] = []
    for start in range(0, len(view) // block_bytes * block_bytes, block_bytes):
        block = hashlib.blake2b(parent, digest_size=HASH_BYTES)
        block.update(view[start : start + block_bytes])
        parent = block.digest()
        hashes.append(parent)
    return hashes

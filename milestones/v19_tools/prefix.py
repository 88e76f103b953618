"""The keys by which full blocks are found. Nothing here imports torch.

A block's key is a hash of all tokens from the sequence's first to the block's last, since its keys and values depend on
all of them. The hash is a cryptographic one: with Python's own, a client could construct a prompt that has another
prompt's keys, and its answer would be computed from the other's keys and values.
"""
import hashlib
from array import array


def root_key(salt: str | None, generation: int = 0) -> bytes:
    """The key that precedes a first block's, 32 bytes. Sequences of different salts or generations have no key in common."""
    content = f"{generation} {salt or ''}".encode(errors="surrogatepass")
    return hashlib.blake2b(content, digest_size=32, person=b"root").digest()


def block_key(parent: bytes, token_ids: list[int]) -> bytes:
    """The key of a block that holds these tokens, 32 bytes; parent is the key of the block before it, or a root_key.

    >>> root_key("a") == root_key("b"), block_key(root_key(None), [5, 6]) == block_key(root_key(None), [5, 7])
    (False, False)
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=32, person=b"block").digest()

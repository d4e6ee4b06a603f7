"""Names by the million: packed into two arrays, and in the order of the numbers in them; knows no files."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

AT_ONCE = 1 << 16
"""Names of which keys are made together: what that takes besides is many times their size."""

LONGEST = 4000
"""Digits at most that `natural_key` takes for one number."""

LOWER = np.arange(256, dtype=np.uint8)
LOWER[ord("A") : ord("Z") + 1] += ord("a") - ord("A")
"""By character of ASCII, its small letter."""


def to_bytes(name: str) -> bytes:
    """Encode a name, which may hold bytes that are no UTF-8, so that bytes compare as the characters do."""
    return name.encode("utf-8", "surrogatepass")


class Names:
    """Strings in two arrays, which processes share, where a list has an object for each, which they copy.

    Args:
        text: uint8, all of them, one after the other.
        starts: int64 (n + 1,), where each begins, and the end.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray) -> None:
        self.text = text
        self.starts = starts

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        text = "".join(names)
        lengths = map(len, names) if text.isascii() else (len(to_bytes(name)) for name in names)
        starts = np.fromiter(chain([0], lengths), np.int64, len(names) + 1)
        return cls(np.frombuffer(to_bytes(text), np.uint8), starts.cumsum(out=starts))

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """Return the names of all parts."""
        lengths = [np.diff(part.starts) for part in parts]
        starts = np.concatenate([np.zeros(1, np.int64), *lengths])
        text = np.concatenate([np.empty(0, np.uint8), *(part.text for part in parts)])
        return cls(text, starts.cumsum(out=starts))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], what: str) -> "Names":
        """Return the names that `arrays` of such a name made arrays of."""
        return cls(arrays[what], arrays[f"{what}_starts"])

    def arrays(self, what: str) -> dict[str, np.ndarray]:
        return {what: self.text, f"{what}_starts": self.starts}

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        return self.text[self.starts[index] : self.starts[index + 1]].tobytes().decode("utf-8", "surrogatepass")


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return what sorts names with numbers in them by these, as timm does, and different names always alike."""
    parts: list[int | str] = [*re.split(rf"(\d{{1,{LONGEST}}})", name.lower())]
    for place in range(1, len(parts), 2):
        parts[place] = int(parts[place])
    return parts, name


def _key(name: str) -> bytes:
    """Return bytes that compare as the parts of `natural_key` do.

    A number is a zero, which ends the part before, its length plus one in two bytes, and its digits.
    """
    key = b""
    for part in natural_key(name)[0]:
        if isinstance(part, str):
            key += to_bytes(part)
        else:
            digits = str(part).lstrip("0").encode()
            key += b"\0" + (len(digits) + 1).to_bytes(2, "big") + digits
    return key


def natural_keys(names: Sequence[str]) -> np.ndarray:
    """Return bytes (n,) that compare as the parts of `natural_key` do: `_key` of each, of ASCII all at once."""
    text = "\0".join(names)
    plain = text.isascii() and text.count("\0") < len(names) and len(max(names, key=len)) < LONGEST
    if not (text and plain):
        return np.array([_key(name) for name in names], np.bytes_)
    written = np.frombuffer(text.encode(), np.uint8)
    widths = np.ones(len(written), np.int64)  # of each character in the keys
    widths[written == 0] = 0
    # numbers: their digits from the first that is no zero on, behind three bytes
    places = np.flatnonzero((written >= ord("0")) & (written <= ord("9")))
    begins = np.diff(places, prepend=-2) > 1
    firsts, number = np.flatnonzero(begins), begins.cumsum() - 1
    counted = written[places] != ord("0")
    so_far = counted.cumsum()
    kept = so_far > (so_far - counted)[firsts][number]
    widths[places] = kept
    widths[places[firsts]] += 3
    ends = widths.cumsum()
    keys = np.zeros(int(ends[-1]), np.uint8)
    shown = np.ones(len(written), bool)
    shown[places] = kept
    shown[written == 0] = False
    keys[ends[shown] - 1] = LOWER[written[shown]]
    heads = (ends - widths)[places[firsts]]
    lengths = np.bincount(number, kept, len(firsts)).astype(np.int64) + 1
    keys[heads + 1], keys[heads + 2] = lengths >> 8, lengths & 255
    # a row for each name
    limits = np.append(ends[np.flatnonzero(written == 0)], ends[-1])
    sizes = np.diff(limits, prepend=0)
    rows = np.zeros((len(names), max(1, int(sizes.max()))), np.uint8)
    rows[np.arange(rows.shape[1]) < sizes[:, None]] = keys
    return rows.view(f"S{rows.shape[1]}")[:, 0]


def natural_order(names: Sequence[str]) -> np.ndarray:
    """Return int64 (n,), the places of names in the order of `natural_key`."""
    by_name = sorted(range(len(names)), key=names.__getitem__)
    parts = [by_name[start : start + AT_ONCE] for start in range(0, len(by_name), AT_ONCE)]
    keys = (
        np.concatenate([natural_keys([names[i] for i in part]) for part in parts]) if parts else np.empty(0, "S1")
    )
    return np.array(by_name, np.int64)[keys.argsort(kind="stable")]

"""How rows of scores are selected: in which tiles, and whether they are narrowed first."""

from dataclasses import dataclass

from torch import Tensor

from scission.kernels.target import Target

# programs that narrow, each of which takes the sample anew; H200, 128 rows of 262144 (of 65536),
# us with the selection: 528 programs 100 (35.5), 264 91 (28.8), 1056 127 (47.3)
_NUM_PROGRAMS = 264
# a narrowed row has up to 2 ** LOG_PARTS parts
LOG_PARTS = 6
SAMPLE = 4096
NARROW_BLOCK = 4096
# by which k and a tile's size are to be missed: once in two million rows on either side
_DEVIATIONS = 5.0


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program holds of a row, and of a short one."""

    size: int
    short: int
    num_warps: int


def tiles(target: Target) -> tuple[Tile, ...]:
    """Every tile that rows are selected with; rows that the last one cannot hold are narrowed."""
    most_warps = 1024 // target.warp_size
    # H200, one row of the size (128 rows), us: 4.2 (5.0), 4.9 (6.0), 6.5 (7.5), 9.3 (11.2), 14.4
    # (18.2); 8 warps save 4 % of the last two, but spill with candidates or on gfx1201
    sizes = ((1024, 1024, 4), (2048, 1024, 4), (4096, 2048, 8), (8192, 2048, 16), (16384, 2048, 16))
    return tuple(Tile(size, short, min(warps, most_warps)) for size, short, warps in sizes)


def pick_tile(max_length: int, k: int, target: Target) -> tuple[Tile, bool]:
    """The smallest that holds a row, or else its candidates, which then is narrowed.

    The square root of a count of samples deviates by a half, whatever the count: a threshold
    midway between the roots of k and the size misses neither where they are far enough apart.
    """
    choices = tiles(target)
    if max_length <= choices[-1].size:
        return next(tile for tile in choices if max_length <= tile.size), False
    share = SAMPLE / max_length
    # the last one would hold more than a program's registers, with what candidates need besides
    for tile in choices[:-1]:
        if share**0.5 * (tile.size**0.5 - k**0.5) >= _DEVIATIONS:
            return tile, True
    return choices[-2], True


@dataclass(frozen=True, slots=True)
class Selection:
    """How rows of some bound are selected."""

    tile: Tile
    num_parts: int  # 0: no row is narrowed
    longest: int  # columns of a part
    sample: int
    block: int  # of columns, read at a time

    @property
    def capacity(self) -> int:
        """Candidates of a part: more than the tile holds are of no use."""
        return min(self.longest, self.tile.size)

    @property
    def scratch_columns(self) -> int:
        """Of int32, beside each row's scores."""
        return self.num_parts * (self.longest // 32 + self.capacity + 1)


def plan_selection(num_rows: int, max_length: int, k: int, target: Target) -> Selection:
    tile, is_narrowed = pick_tile(max_length, k, target)
    if not is_narrowed:
        return Selection(tile, 0, 0, SAMPLE, NARROW_BLOCK)
    num_blocks = -(-max_length // NARROW_BLOCK)
    num_parts = min(max(_NUM_PROGRAMS // max(num_rows, 1), 1), 1 << LOG_PARTS, num_blocks)
    longest = -(-num_blocks // num_parts) * NARROW_BLOCK
    return Selection(tile, num_parts, longest, SAMPLE, NARROW_BLOCK)


@dataclass(frozen=True, slots=True)
class Entries:
    """Whose columns are the entries of a sequence, and where these lie in the pool."""

    positions: Tensor  # [num_rows] int64
    sequences: Tensor  # [num_rows] int64: row of block_tables
    block_tables: Tensor  # [num_seqs, max_blocks] int64
    ratio: int  # tokens an entry
    rows_per_block: int

"""Result types, and the static description of one alignment. Imports nothing of ours and no jax."""

from typing import Any, Literal, NamedTuple

from moe_align_jax._core.int32 import cdiv

Implementation = Literal["mosaic_gpu", "xla", "emulator"]


# What a program that is sized at launch is told: n, P, and where the first id lies behind the pointer.
LAUNCH_SIZES = ("num_pairs", "capacity", "first_id")
# A kernel's pointers count as 256-byte aligned: a view starts at most 63 words behind such an address.
MAX_FIRST_ID = 64
# round(2**32 / golden ratio) as int32. Its multiples, read as fractions of 2**32, fill the unit interval as
# evenly as any sequence does, from whichever token on and however few: better than random.
HASH_MULTIPLIER = 2654435761 - 2**32


class AlignedBlocks(NamedTuple):
    """Pairs grouped by expert, each group padded to whole blocks.

    With n pairs, E experts, blocks of `block_size` rows, capacity P and B = cdiv(P, block_size);
    the example is ids `[[2, 3], [1, 2], [1, 3]]`, so n = 6, with E = 4 and block_size = 4:

    Attributes:
        sorted_token_ids: `[P]` int32. Pair indices (`token * top_k + k`) grouped by expert, ascending
            within an expert; every other slot, to the very end, holds n. So in each block the pairs come
            first: the grouped products count on it.
            `[2, 4, 6, 6,  0, 3, 6, 6,  1, 5, 6, 6, ...]`
        expert_ids: `[B]` int32. `expert_ids[b]` is the expert of rows `[b*block_size, (b+1)*block_size)`;
            -1 in every block past the last used one. `[1, 2, 3, -1, ...]`
        num_tokens_post_padded: `[1]` int32. Rows in use
            = `sum(round_up(tokens_per_expert, block_size))`. `[12]`
        tokens_per_expert: `[E]` int32. Pairs kept per expert, by local id where an expert map was
            applied before counting. `[0, 2, 2, 2]`
        row_of_pair: `[n]` int32, or None. `sorted_token_ids[row_of_pair[i]] == i`; -1 for a dropped
            pair. `[4, 8, 0, 5, 1, 9]`
    """

    sorted_token_ids: Any
    expert_ids: Any
    num_tokens_post_padded: Any
    tokens_per_expert: Any
    row_of_pair: Any = None


class Selection(NamedTuple):
    """What `select_implementation` answers.

    Attributes:
        implementation: the implementation that would run.
        form: its algorithm for this size, e.g. "warp", "block", "grid", "radix" or "sort".
        reasons: for each other implementation, why it would not run.
    """

    implementation: str
    form: str
    reasons: dict[str, str]


class AlignProblem(NamedTuple):
    """Everything static about one `moe_align_block_size`: the key of every cache.

    Attributes:
        num_pairs: n, the length of the flat `topk_ids` (>= 1).
        num_experts: E.
        block_size: rows per block.
        capacity: P, the length of `sorted_token_ids`.
        id_words: int32 words per id: 1, or 2 for 64-bit ids (low word first).
        expert_map: how the expert map is used: "" without one, "label" (it renames the finished blocks)
            or "filter" (applied before counting; remote pairs are dropped).
        has_num_valid_pairs: whether a device scalar bounds the pairs in use.
        return_inverse: whether `row_of_pair` is an output.
        minus_one: id -1 is a group of its own ahead of expert 0, with blocks that read -1 (SGLang's
            convention); num_experts counts it.
        return_counts: whether `tokens_per_expert` is an output.
        sized_at_launch: num_pairs and capacity are only upper bounds; the launch gives the real ones,
            and the position of the first id. For the direct launch from PyTorch, where a new size
            must not cost a compile.
        tuning: whose table chooses form and sizes (`_align.tables.table_name`); "" for the default.
        dispatch: how a pair takes a physical slot of its logical expert: "" where ids are slots, "static"
            by one table, "dynamic" by a hash of the token. num_experts counts the slots.
        num_logical: with dispatch, El: ids outside `[0, El)` are dropped.
        replica_width: with "dynamic", X: slots per logical expert in the table.
        top_k: with "dynamic" or shared columns, pairs per token.
        num_layers: with dispatch, layers that the tables hold, of which the input `layer` names one; 0
            where they are of one layer.
        num_shared: with dispatch, so many last columns of the top_k hold slots already.
        num_local: with the map "filter", local ids from this one on are dropped, too; 0 for num_experts.
    """

    num_pairs: int
    num_experts: int
    block_size: int
    capacity: int
    id_words: int = 1
    expert_map: str = ""
    has_num_valid_pairs: bool = False
    return_inverse: bool = False
    minus_one: bool = False
    return_counts: bool = True
    sized_at_launch: bool = False
    tuning: str = ""
    dispatch: str = ""
    num_logical: int = 0
    replica_width: int = 0
    top_k: int = 1
    num_layers: int = 0
    num_shared: int = 0
    num_local: int = 0

    name = "moe_align_block_size"

    @property
    def num_mapped(self) -> int:
        """With the map "filter": local ids are below it."""
        return self.num_local or self.num_experts

    @property
    def num_blocks(self) -> int:
        return -(-self.capacity // self.block_size)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each int32 operand, in order."""
        rows = self.num_pairs + (MAX_FIRST_ID if self.sized_at_launch else 0)
        shapes = {"topk_ids": (rows,) if self.id_words == 1 else (rows, self.id_words)}
        layers = max(self.num_layers, 1)
        if self.dispatch == "static":
            shapes["static_dispatch_map"] = (layers * self.num_logical,)
        elif self.dispatch:
            rows = layers * self.num_logical
            shapes["logical_to_physical_map"] = (rows * self.replica_width,)
            shapes["num_replicas"] = (rows,)
            shapes["first_token"] = (layers,)
        if self.num_layers:
            shapes["layer"] = (1,)
        if self.expert_map:
            shapes["expert_map"] = (self.num_experts,)
        if self.has_num_valid_pairs:
            shapes["num_valid_pairs"] = (1,)
        if self.sized_at_launch:
            shapes |= dict.fromkeys(LAUNCH_SIZES, (1,))
        return shapes

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each int32 result, in order."""
        shapes = {
            "sorted_token_ids": (self.capacity,),
            "expert_ids": (self.num_blocks,),
            "num_tokens_post_padded": (1,),
        }
        if self.return_counts:
            shapes["tokens_per_expert"] = (self.num_experts,)
        if self.return_inverse:
            shapes["row_of_pair"] = (self.num_pairs,)
        return shapes


class BatchedAlignProblem(NamedTuple):
    """Everything static about one `batched_moe_align_block_size` (the `[E, max_tokens, H]` layout)."""

    num_experts: int
    max_tokens_per_batch: int
    block_size: int
    tuning: str = ""

    name = "batched_moe_align_block_size"

    @property
    def num_pairs(self) -> int:
        """Rows of the `[E, max_tokens]` layout; also the sentinel."""
        return self.num_experts * self.max_tokens_per_batch

    @property
    def capacity(self) -> int:
        blocks_per_expert = cdiv(self.max_tokens_per_batch, self.block_size)
        return self.num_experts * blocks_per_expert * self.block_size

    @property
    def num_blocks(self) -> int:
        return cdiv(self.capacity, self.block_size)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {"expert_num_tokens": (self.num_experts,)}

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        return {
            "sorted_token_ids": (self.capacity,),
            "expert_ids": (self.num_blocks,),
            "num_tokens_post_padded": (1,),
            "tokens_per_expert": (self.num_experts,),
        }

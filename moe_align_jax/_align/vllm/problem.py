"""The static description of a call of vLLM's two other aligned ops. Sized at launch; imports no jax."""

from typing import NamedTuple

from moe_align_jax._core.int32 import cdiv
from moe_align_jax.types import AlignProblem

# Entries that a warp looks through for its adapter, a lane each and so many times.
MAX_LORA_IDS = 1024


class ReceivedProblem(NamedTuple):
    """Everything static about one `fused_globalize_align_block_size`, n pairs of local ids.

    Attributes:
        num_pairs, num_experts, block_size, capacity, tuning: of the alignment, of local experts.
        top_k: pairs per token.
        psum_words: int32 words of an element of `psum`, 1 or 2.
        num_ranks: the most elements of `psum`; the launch gives the place of the last.
        with_scatter: whether `scatter_idx` is an output.
    """

    num_pairs: int
    num_experts: int
    block_size: int
    capacity: int
    top_k: int
    psum_words: int = 1
    num_ranks: int = 1
    with_scatter: bool = False
    tuning: str = ""

    name = "fused_globalize_align_block_size"
    # By value: n, P, the global id of the first expert, the local ids that exist, and where psum ends.
    launch_sizes = ("num_pairs", "capacity", "first_expert", "bound", "last_rank")

    @property
    def align(self) -> AlignProblem:
        """The alignment behind the ids."""
        return AlignProblem(
            self.num_pairs,
            self.num_experts,
            self.block_size,
            self.capacity,
            return_inverse=True,
            return_counts=False,
            sized_at_launch=True,
            tuning=self.tuning,
        )

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each int32 operand, in order. `local_ids` and the output `topk_idx` are one piece
        of memory: `[n]` int64, as words."""
        return {
            "local_ids": (2 * self.num_pairs,),
            "psum": (self.num_ranks * self.psum_words,),
            **dict.fromkeys(self.launch_sizes, (1,)),
        }

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each int32 result, in order."""
        scatter = {"scatter_idx": (self.num_pairs,)} if self.with_scatter else {}
        aligned = self.align.outputs
        del aligned["row_of_pair"]
        return {"topk_idx": (2 * self.num_pairs,), **aligned, **scatter}

    def sized(self, sizes: dict[str, int]) -> "ReceivedProblem":
        """With what a launch gives; for tests, which hold a buffer's exact length."""
        return self._replace(
            num_pairs=sizes["num_pairs"],
            capacity=sizes["capacity"],
            num_ranks=sizes["last_rank"] + 1,
        )


class AdaptersProblem(NamedTuple):
    """Everything static about one `moe_lora_align_block_size`: an alignment for each of L adapters.

    Attributes:
        num_pairs, num_experts, block_size, capacity, id_words, tuning: of an alignment.
        top_k: pairs per token.
        num_adapters: L.
        num_lora_ids: length of `lora_ids`.
        has_expert_map: whether a map filters the pairs.
        whole_rows: whether the launch's capacity is a multiple of 4, so that 16 bytes can be stored at once.
    """

    num_pairs: int
    num_experts: int
    block_size: int
    capacity: int
    top_k: int
    num_adapters: int
    num_lora_ids: int
    id_words: int = 1
    has_expert_map: bool = False
    whole_rows: bool = False
    tuning: str = ""

    name = "moe_lora_align_block_size"
    launch_sizes = ("num_pairs", "capacity")

    @property
    def align(self) -> AlignProblem:
        """One adapter's alignment."""
        return AlignProblem(
            self.num_pairs,
            self.num_experts,
            self.block_size,
            self.capacity,
            self.id_words,
            "filter" if self.has_expert_map else "",
            return_counts=False,
            sized_at_launch=True,
            tuning=self.tuning,
        )

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each int32 operand, in order."""
        pairs = (self.num_pairs,) if self.id_words == 1 else (self.num_pairs, self.id_words)
        return {
            "topk_ids": pairs,
            "token_lora_mapping": (cdiv(self.num_pairs, self.top_k),),
            "adapter_enabled": (self.num_adapters,),
            "lora_ids": (self.num_lora_ids,),
            **({"expert_map": (self.num_experts,)} if self.has_expert_map else {}),
            **dict.fromkeys(self.launch_sizes, (1,)),
        }

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each int32 result, in order: the adapters' one behind the other."""
        shapes = self.align.outputs
        return {name: (self.num_adapters * size,) for name, (size,) in shapes.items()}

    def sized(self, sizes: dict[str, int]) -> "AdaptersProblem":
        """As that of `ReceivedProblem`."""
        return self._replace(num_pairs=sizes["num_pairs"], capacity=sizes["capacity"])

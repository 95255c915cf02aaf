"""What a grouped matrix multiplication is compiled for, for a launch outside XLA. No jax here."""

from typing import Any, NamedTuple

from moe_align_jax._grouped_matmul.choose_tiles import config_for
from moe_align_jax._grouped_matmul.config import Config, unshared, unsupported
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Scales, Weights
from moe_align_jax._grouped_matmul.shape import shape_of

# The values of a launch that are no pointers. They are given times 256.
NUM_ROWS, NUM_PAIRS, SCALE_PITCH = "num_rows", "num_pairs", "scale_pitch"
LAUNCH_VALUES = (NUM_ROWS, NUM_PAIRS, SCALE_PITCH)


class DirectMatmul(NamedTuple):
    """A grouped matrix multiplication, as a program of `torch_bridge`.

    Attributes:
        problem: it; of "blocks" its rows and tokens, and the pitch of x's scales, are the most that a launch
            has.
        gpu_kind: whose tiles it takes: the card's name.
        config: its tiles; None for the usual ones.
    """

    problem: MatmulProblem
    gpu_kind: str = ""
    config: Config | None = None

    name = "grouped_matmul"

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "DirectMatmul":
        """From `_asdict()` that went through JSON, where tuples become lists."""
        problem = MatmulProblem(*fields["problem"])
        scales = problem.scales
        problem = problem._replace(
            weights=Weights(*problem.weights), scales=Scales(*scales) if scales else None
        )
        config = fields["config"]
        if config:
            config = Config(*config)
            config = config._replace(heights=tuple(config.heights))  # JSON has lists
        return cls(problem, fields["gpu_kind"], config or None)

    @property
    def sized_at_launch(self) -> bool:
        """Whether a launch says how many rows and pairs it has."""
        return self.problem.rows == "blocks"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.problem.num_experts

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return self.problem.block_size

    @property
    def tiles(self) -> Config:
        """The tiles that the kernel is built with: those given, else the ones for the problem on that GPU."""
        # Tiles that a cluster shares have run under jit alone.
        found = self.config or unshared(config_for(self.problem, self.gpu_kind, lists=False))
        if not found.heights or found.finds:
            return found
        return found._replace(heights=(), exact=False, falling=False)  # no launch lists them

    @property
    def refusal(self) -> str | None:
        """Why there is no such program, or None."""
        if self.problem.rows == "ragged":
            return "groups of rows that follow each other are not launched directly"
        if self.pitched and self.problem.top_k:
            return "the pitch of scales by columns would be compiled in where rows are gathered"
        return unsupported(self.problem)

    @property
    def pitched(self) -> bool:
        """Whether a launch says how far columns of x's scales lie apart: a tile's rows at least, 4 n."""
        scales = self.problem.scales
        return self.sized_at_launch and scales is not None and scales.x == "column_major"

    @property
    def spare_rows(self) -> int:
        """How many elements behind its last one sorted_token_ids and row_weights must have."""
        return self.tiles.bm if shape_of(self.problem, self.tiles).partial else 0

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each value that a launch gives ahead of the result, in order.

        First the sizes; then the arrays as the kernel reads them, those that there are of
        num_tokens_post_padded, expert_ids and sorted_token_ids (or masked_m), row_weights, bias (float32,
        with whole tiles of columns), the scales, x, and the weights (w, or gate and up).
        """
        given, shape = self.problem.inputs, shape_of(self.problem, self.tiles)
        found: dict[str, tuple[int, ...]] = {}
        if self.sized_at_launch:
            found |= {NUM_ROWS: (1,), NUM_PAIRS: (1,)}
        if self.pitched:
            found[SCALE_PITCH] = (1,)
        names = ["num_tokens_post_padded", "expert_ids"]
        if shape.reads_ids:
            names.append("sorted_token_ids")
        names += ["masked_m", "row_weights", "bias"]
        names += ["x_scales", "w_scales", "gate_scales", "up_scales", "x", "w", "gate", "up"]
        found |= {name: given[name][0] for name in names if name in given}
        if "bias" in found:
            experts, width = self.problem.num_experts, shape.n_tiles * shape.columns
            found["bias"] = (experts, width * (2 if self.problem.weights.gated else 1))
        return found

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the result."""
        return {"out": self.problem.out_shape}

"""The static description of one grouped matrix multiplication. Imports no jax."""

from typing import Any, Literal, NamedTuple

from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
ACTIVATIONS: tuple[str, ...] = ("silu", "gelu", "gelu_tanh", "relu2")

Rows = Literal["blocks", "masked", "ragged"]

E4M3 = "float8_e4m3fn"


class Weights(NamedTuple):
    """How the weights lie in memory, and what the epilogue does with their products.

    Attributes:
        transposed: `[E, N, K]` instead of `[E, K, N]`.
        pair: gate and up are two arrays.
        activation: of the products; None for none.
        gated: the products are gate and up: the result is `activation(gate) * up`. False without activation.
        interleaved: column 2 j is gate, 2 j + 1 is up, in place of all of gate, then all of up.
        swiglu_limit, swiglu_alpha: as `silu_and_mul_masked_quant` has them.
        bias: whether there is one.
    """

    transposed: bool = False
    pair: bool = False
    activation: str | None = None
    gated: bool = False
    interleaved: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    bias: bool = False


class Scales(NamedTuple):
    """How the scales of e4m3 operands lie. All of them are float32 but packed ones.

    Attributes:
        x: "tensor": one for all of x; "row_major" or "column_major": one for each row and 128 columns.
        w: "tensor": one for each expert; "blocks": one for each 128 x 128 of its matrix.
        packed: those of x are exponents, four to an int32, the first in the lowest byte.
        pitch: of "column_major": from the scales of 128 columns to those of the next, in elements.
    """

    x: str
    w: str
    packed: bool = False
    pitch: int = 0


class MatmulProblem(NamedTuple):
    """Everything static about one grouped matrix multiplication: the key of every cache.

    A row of the result is that of `x`, times the weights of the row's expert. Rows of an expert lie together,
    and `rows` says how an array on the device tells where:

        "blocks": row r is in block `r // block_size`; `expert_ids` `[B]` gives the block's expert (-1: the
            rows are zero), `num_tokens_post_padded` `[1]` the rows in use, and `sorted_token_ids` `[P]` the
            pair of each row (negative or not below `num_pairs`: the row holds none, and is zero). The pairs
            of a block come first: kernels may take what is behind its first padding for padding.
        "masked": expert e has rows `e * max_rows` on, of which `masked_m[e]` are in use.
        "ragged": groups follow each other; `group_sizes` `[G]` tells their rows. Group `g` uses the weights
            `g - group_offset[0]`; groups for which there are none, and rows behind the last group, are zero.

    Attributes:
        function: the public function, for messages.
        rows: see above.
        num_rows: of the result. P, e * max_rows or m.
        k: columns of x.
        n: columns of the result.
        num_experts: E, of the weights.
        dtype: of x and the weights.
        out_dtype: of the result.
        weights: how they lie, and the epilogue.
        block_size: of "blocks".
        max_rows: of "masked".
        num_groups: of "ragged".
        num_tokens, top_k: with top_k >= 1, x is `[num_tokens, k]`, and row r of the product is that of
            token `sorted_token_ids[r] // top_k`.
        row_weights: whether each row of the result is multiplied by a float32 weight.
        zero_padding: whether rows in use that hold no pair must be zero. A caller that never reads them
            (a combine by `row_of_pair`) saves the test of each row.
        whole_blocks: every row of a block with an expert is multiplied: `sorted_token_ids` is no operand.
        expected_rows: of an expert, which tiles are chosen for; 0: as the sizes say.
        num_pairs: of "blocks" without top_k: ids below it are pairs. 0 where the last slot tells it.
        consecutive: of "blocks": it is known that an expert's rows follow each other without a gap. They do,
            unless an expert map gives two experts one local id, or a caller made the alignment.
        row_labels: of "blocks": `expert_ids` is `[P]`, that of each row, of which the first of a block
            counts; all rows are in use, and there is no `num_tokens_post_padded`. Pairs come first: behind a
            row whose label is no expert's the kernel may take the block's rows for padding, and make them
            zero. For a launch outside XLA.
        leaves_padding: with `zero_padding` False: the kernel may leave rows that hold no pair as they were.
            They may hold NaN then.
        precision: of the products, for "xla"; any value that `jax.lax.dot_general` takes.
        scales: of e4m3 operands; None for others.
        all_rows: of "blocks": it is known that all rows are in use, so that a kernel need not wait for
            `num_tokens_post_padded` before it knows its tiles. A block may have no expert all the same.
            A launch that says how many rows it has (`kernel.build`'s `sized_at_launch`) reads it.
        in_order: with top_k and blocks of one row: it is known that row r is pair r, of token r // top_k.
        inverse: with top_k: the last operand is `row_of_pair` `[num_tokens, top_k]`, the row of each pair, -1
            for none. By it a launch may copy tokens' rows to those of their pairs (spread.py).
        few_forms: of blocks of one row: how few forms the batch sizes of a model shall have, so that it needs
            few kernels: 0: each the fastest; 1: narrow tiles remain narrow, at most two CTAs share one, and
            sums have the tiles of one token; 2: as well, as many CTAs share a tile as of one token.
    """

    function: str
    rows: str
    num_rows: int
    k: int
    n: int
    num_experts: int
    dtype: str
    out_dtype: str
    weights: Weights = Weights()
    block_size: int = 0
    max_rows: int = 0
    num_groups: int = 0
    num_tokens: int = 0
    top_k: int = 0
    row_weights: bool = False
    zero_padding: bool = True
    precision: Any = None
    scales: Scales | None = None
    whole_blocks: bool = False
    expected_rows: int = 0
    num_pairs: int = 0
    consecutive: bool = False
    row_labels: bool = False
    leaves_padding: bool = False
    all_rows: bool = False
    in_order: bool = False
    inverse: bool = False
    few_forms: int = 0

    @property
    def w_columns(self) -> int:
        """Columns of the products: 2 n where gated."""
        return 2 * self.n if self.weights.gated else self.n

    @property
    def counts_pairs(self) -> bool:
        """Whether a launch of any size must tell its pairs: what rows hold is compared with them."""
        return self.top_k > 0 or self.leaves_padding

    @property
    def num_blocks(self) -> int:
        """Blocks of the rows, the last of which may be partial."""
        return -(-self.num_rows // self.block_size)

    @property
    def num_floats(self) -> int:
        """How many of the operands can have a derivative; they come first."""
        return 2 + self.weights.pair + self.weights.bias + self.row_weights

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each operand by name, in order."""
        weights, dtype = self.weights, self.dtype
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        found["x"] = ((self.num_tokens if self.top_k else self.num_rows, self.k), dtype)
        columns = self.n if weights.pair else self.w_columns
        shape = (columns, self.k) if weights.transposed else (self.k, columns)
        for name in ("gate", "up") if weights.pair else ("w",):
            found[name] = ((self.num_experts, *shape), dtype)
        if weights.bias:
            found["bias"] = ((self.num_experts, self.w_columns), "float32")
        if self.row_weights:
            found["row_weights"] = ((self.num_rows,), "float32")
        if self.scales:
            found["x_scales"] = (self._x_scales, "int32" if self.scales.packed else "float32")
            blocks = (1, 1)
            if self.scales.w == "blocks":
                blocks = (-(-columns // GROUP), self.scale_groups)
            for name in ("gate_scales", "up_scales") if weights.pair else ("w_scales",):
                found[name] = ((self.num_experts, *blocks), "float32")
        if self.rows == "blocks":
            if not self.whole_blocks:
                found["sorted_token_ids"] = ((self.num_rows,), "int32")
            labels = self.num_rows if self.row_labels else self.num_blocks
            found["expert_ids"] = ((labels,), "int32")
            if not self.row_labels:
                found["num_tokens_post_padded"] = ((1,), "int32")
            if self.inverse:
                found["row_of_pair"] = ((self.num_tokens, self.top_k), "int32")
        elif self.rows == "masked":
            found["masked_m"] = ((self.num_experts,), "int32")
        else:
            found["group_sizes"] = ((self.num_groups,), "int32")
            found["group_offset"] = ((1,), "int32")
        return found

    @property
    def scale_groups(self) -> int:
        """Scales of a row of x."""
        return -(-self.k // GROUP)

    @property
    def _x_scales(self) -> tuple[int, ...]:
        """Shape of the scales of x."""
        assert self.scales
        if self.scales.x == "tensor":
            return (1,)
        words = self.scale_groups
        if self.scales.packed:
            words = -(-words // GROUPS_PER_WORD)
        if self.scales.x == "row_major":
            return (self.num_tokens if self.top_k else self.num_rows, words)
        columns = (words, self.scales.pitch)
        return (self.num_experts, *columns) if self.rows == "masked" else columns

    @property
    def out_shape(self) -> tuple[int, int]:
        """Shape of the result."""
        return (self.num_rows, self.n)

    @property
    def smallest(self) -> "MatmulProblem":
        """Of blocks of one row: that of one token; of one row where it is not told how many a token has."""
        if not self.top_k:
            return self._replace(num_rows=1, num_pairs=1)
        return self._replace(num_tokens=1, num_rows=self.top_k, num_pairs=self.top_k)

    @property
    def permuted(self) -> "MatmulProblem":
        """Of rows of x that were gathered: `[num_rows, k]`."""
        pairs = self.num_tokens * self.top_k
        return self._replace(num_tokens=0, top_k=0, num_pairs=pairs, inverse=False)

    @property
    def plain(self) -> "MatmulProblem":
        """The products that the epilogue gets, of one array of weights; bias included."""
        columns = self.n if self.weights.pair else self.w_columns
        weights = Weights(self.weights.transposed, bias=self.weights.bias)
        return self._replace(
            n=columns,
            weights=weights,
            out_dtype=self.dtype,
            row_weights=False,
            zero_padding=False,
            leaves_padding=False,
        )

    @property
    def input_gradient(self) -> "MatmulProblem":
        """Those products' derivatives to those of the rows: the weights are read the other way."""
        plain = self.plain
        weights = Weights(transposed=not self.weights.transposed)
        rows = {"num_tokens": 0, "top_k": 0}
        return plain._replace(k=plain.n, n=plain.k, weights=weights, **rows)

    @property
    def weight_gradient(self) -> "WeightGradient":
        """Of one array of weights, in the layout that it has. A gathered x is gathered."""
        plain, transposed = self.plain, self.weights.transposed
        k, n = (plain.n, plain.k) if transposed else (plain.k, plain.n)
        gathered = ("rhs" if transposed else "lhs") if self.top_k else None
        return WeightGradient(plain._replace(k=k, n=n, weights=Weights()), gathered)


class ActivationGradient(NamedTuple):
    """Everything static about a layer's backward step across its activation.

    Attributes:
        product: of the cotangents of tokens' results and w_down, read the other way: `[P, N]`, gathered.
        weights: those of the first products: how gate and up lie in them, and the activation.
    """

    product: MatmulProblem
    weights: Weights

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each operand by name, in order."""
        product = self.product
        rows, n = product.out_shape
        found: dict[str, tuple[tuple[int, ...], str]] = {"products": ((rows, 2 * n), product.dtype)}
        found["scale"] = ((rows,), "float32")
        return found | product.inputs


class WeightGradient(NamedTuple):
    """Everything static about one weight gradient: for each expert, lhs^T rhs over its rows.

    Attributes:
        layout: whose rows are whose, as for the product; k are lhs' columns, n those of rhs.
        gathered: "lhs" or "rhs" is `[num_tokens, .]`, and row r is that of token
            `sorted_token_ids[r] // top_k`; None: both have their rows in order.
    """

    layout: MatmulProblem
    gathered: str | None = None

    @property
    def function(self) -> str:
        """The function that errors name."""
        return self.layout.function

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each operand by name, in order."""
        layout, found = self.layout, {}
        for name, columns in (("lhs", layout.k), ("rhs", layout.n)):
            rows = layout.num_tokens if self.gathered == name else layout.num_rows
            found[name] = ((rows, columns), layout.dtype)
        where = list(layout.inputs.items())[layout.num_floats :]
        return found | dict(where)

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """Shape of the result: [E, K, N]."""
        return (self.layout.num_experts, self.layout.k, self.layout.n)


class TokenSum(NamedTuple):
    """Everything static about a product of blocks of one pair, and the sum of each token's rows of it.

    Pair t * top_k + k is the k-th of token t. One whose `expert_ids` is no expert adds nothing.

    Attributes:
        product: of the pairs, `[num_tokens * top_k, n]`; without an activation.
        num_tokens, top_k: T and K.
        out_dtype: of the sums.
    """

    product: MatmulProblem
    num_tokens: int
    top_k: int
    out_dtype: str

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each operand by name, in order."""
        names = ["x", "w", *(["bias"] if self.product.weights.bias else []), "expert_ids"]
        found = {name: self.product.inputs[name] for name in names}
        return found | {"topk_weights": ((self.num_tokens, self.top_k), "float32")}

    @property
    def out_shape(self) -> tuple[int, int]:
        """Shape of the result: [T, H]."""
        return (self.num_tokens, self.product.n)

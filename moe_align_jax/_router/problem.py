"""The static description of one router call. Imports nothing of ours and no jax."""

from typing import Literal, NamedTuple

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid", "sqrtsoftplus")
# A fourth one, which only torch_bridge asks for: the scores are given, and nothing is computed of them.
GIVEN_SCORES = "none"
DTYPES = ("float32", "bfloat16", "float16")

# What is added to the sum by which weights are divided: sigmoid and sqrtsoftplus scores may all be 0.
SUM_FLOOR = 1e-20
# The greatest finite number of each dtype: an infinite logit counts as this one.
GREATEST = {
    "float32": float.fromhex("0x1.fffffep127"),
    "bfloat16": float.fromhex("0x1.fep127"),
    "float16": 65504.0,
}


class RouteProblem(NamedTuple):
    """Everything static about one `route_topk`: the key of every cache.

    Attributes:
        num_tokens: T.
        num_experts: E.
        top_k: K.
        dtype: of the logits.
        scoring: "softmax", "sigmoid", "sqrtsoftplus" or GIVEN_SCORES.
        softmax_after_topk: softmax over the K chosen logits, instead of over all E.
        renormalize: weights are divided by their sum.
        num_groups: G, groups of E / G neighbouring experts.
        topk_groups: groups that may be chosen from.
        scaling_factor: of the weights.
        bias_rows: rows of the correction bias `[rows, E]`, each for T / rows neighbouring tokens (a vmapped
            batch has several); 0 without a bias.
        has_token_mask: whether an int32 `[T]` says which tokens are real (not 0).
        has_num_valid_tokens: whether a device scalar bounds the tokens in use.

    What follows is of launches outside jax, by torch_bridge, which write what vLLM's ops write:

    Attributes:
        sized_at_launch: num_tokens is only an upper bound; the launch gives the real one. With a bias it has
            one row.
        has_padding: whether bytes `[T]` say which tokens are padding (not 0), whose ids are -1.
        keeps_weights: padding keeps the weights that it would have if it were none; otherwise they are 0.
        id_words: int32 words of an id, 1 or 2.
        with_order: a third result, `token_expert_indices`: k * T + t of token t's k-th expert.
    """

    num_tokens: int
    num_experts: int
    top_k: int
    dtype: str = "float32"
    scoring: str = "softmax"
    softmax_after_topk: bool = False
    renormalize: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    scaling_factor: float = 1.0
    bias_rows: int = 0
    has_token_mask: bool = False
    has_num_valid_tokens: bool = False
    sized_at_launch: bool = False
    has_padding: bool = False
    keeps_weights: bool = False
    id_words: int = 1
    with_order: bool = False

    name = "route_topk"

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.num_groups

    @property
    def limits_groups(self) -> bool:
        """Whether some experts are out of the choice."""
        return self.topk_groups < self.num_groups

    @property
    def may_drop(self) -> bool:
        """Whether a token may be none that is real. Its ids are -1 then; otherwise each is an expert's."""
        return self.has_token_mask or self.has_num_valid_tokens or self.has_padding

    @property
    def over_chosen(self) -> bool:
        """Whether weights depend on the chosen logits alone: a softmax over all, divided by the chosen ones'
        sum, is the softmax over those."""
        return self.scoring == "softmax" and (self.softmax_after_topk or self.renormalize)

    @property
    def by_logits(self) -> bool:
        """Whether the choice is by the logits themselves: each scoring grows with the logit, so that without
        a bias the order is the same, and the finer one."""
        return not self.bias_rows or self.softmax_after_topk

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each operand, in order."""
        shapes: dict[str, tuple[int, ...]] = {"logits": (self.num_tokens, self.num_experts)}
        if self.bias_rows:
            shapes["correction_bias"] = (self.bias_rows, self.num_experts)
        if self.has_token_mask:
            shapes["token_mask"] = (self.num_tokens,)
        if self.has_num_valid_tokens:
            shapes["num_valid_tokens"] = (1,)
        if self.has_padding:
            shapes["is_padding"] = (-(-self.num_tokens // 4),)  # words
        if self.sized_at_launch:
            shapes["num_tokens"] = (1,)
        return shapes

    @property
    def outputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name, shape and dtype of each result, in order."""
        shape = (self.num_tokens, self.top_k)
        ids = "int32" if self.id_words == 1 else "int64"
        found = {"topk_weights": (shape, "float32"), "topk_ids": (shape, ids)}
        return found | ({"token_expert_indices": (shape, "int32")} if self.with_order else {})

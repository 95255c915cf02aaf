"""Which programs are compiled: every size of `forms`, every bucket, and every two options together."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from moe_align_jax._align import tables
from moe_align_jax._core import checks
from moe_align_jax.types import AlignProblem, BatchedAlignProblem
from tests import forms

# "jit": as XLA launches it. "vmap": the same over a batch. "direct": as torch_bridge launches it, with PDL
# and sized at launch.
MODES = ("jit", "vmap", "direct")
BATCH = 3  # odd, so that rows of a batch lie at any word

_CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": MODES,
    "map": ("", "label", "filter"),
    "id_words": (1, 2),
    "num_valid_pairs": (False, True),
    "return_inverse": (False, True),
    "pad_sorted_ids": (False, True),
    "minus_one": (False, True),
    "return_counts": (True, False),
    "dispatch": ("", "static", "dynamic"),
    "num_layers": (0, 3),
    "num_shared": (0, 1),
}
# Every program size up to here, sized at launch, with these experts.
_MOST_PAIRS, _BUCKET_EXPERTS, _BUCKET_BLOCK = 1 << 20, 256, 64

type Options = dict[str, Any]


class Case(NamedTuple):
    """One program, and how it is launched."""

    problem: AlignProblem | BatchedAlignProblem
    mode: str

    @property
    def form(self) -> str:
        return tables.config_for(self.problem).form

    def __str__(self) -> str:
        plain = self.problem._field_defaults
        said = [
            f"{name}={value}"
            for name, value in self.problem._asdict().items()
            if name not in plain or value != plain[name]
        ]
        return f"{self.form}, {self.mode}: {', '.join(said)}"


def _possible(options: Options) -> bool:
    """Whether anything asks for this: torch_bridge alone has the bucket of id -1 and leaves out counts,
    its programs' capacity is a bucket's, and it takes no expert location."""
    if (options["num_layers"] or options["num_shared"]) and not options["dispatch"]:
        return False
    if options["mode"] == "direct":
        return not options["pad_sorted_ids"] and not options["dispatch"]
    return options["return_counts"] and not options["minus_one"]


def _pairs(options: Options) -> set[tuple]:
    return set(itertools.combinations(sorted(options.items()), 2))


def covering() -> list[Options]:
    """Options so that every two values which can meet, meet. Plain and all of them come first, by mode."""
    possible = [
        options
        for values in itertools.product(*_CHOICES.values())
        if _possible(options := dict(zip(_CHOICES, values, strict=True)))
    ]
    of_mode = [[o for o in possible if o["mode"] == mode] for mode in MODES]
    rows = [options for group in of_mode for options in (group[0], group[-1])]
    left = set().union(*map(_pairs, possible)) - set().union(*map(_pairs, rows))
    while left:
        rows.append(max(possible, key=lambda options: len(_pairs(options) & left)))
        left -= _pairs(rows[-1])
    return rows


def align_case(size: forms.Size, options: Options) -> Case:
    direct = options["mode"] == "direct"
    pairs = tables.size_bucket(*size) if direct else size.num_pairs
    capacity = checks.capacity(
        pairs,
        block_size=size.block_size,
        num_experts=size.num_experts,
        pad_sorted_ids=options["pad_sorted_ids"],
    )
    problem = AlignProblem(
        num_pairs=pairs,
        num_experts=size.num_experts,
        block_size=size.block_size,
        capacity=capacity,
        id_words=options["id_words"],
        expert_map=options["map"],
        has_num_valid_pairs=options["num_valid_pairs"],
        return_inverse=options["return_inverse"],
        minus_one=options["minus_one"],
        return_counts=options["return_counts"],
        sized_at_launch=direct,
        num_local=size.num_experts // 2 if direct and options["map"] == "filter" else 0,
        **forms.location_sizes(
            size, options["dispatch"], options["num_layers"], options["num_shared"]
        ),
    )
    return Case(problem, options["mode"])


def _all() -> Iterator[Case]:
    rows = covering()
    plain_and_all = len(MODES) * 2
    by_form: dict[str, list[forms.Size]] = {}
    for size in forms.SIZES:
        by_form.setdefault(size.form, []).append(size)
    for sizes in by_form.values():
        # Each size plain and with all options, in turn by mode; each form with every row.
        for k, size in enumerate(sizes):
            for turn in (0, 3):
                yield align_case(size, rows[(2 * k + turn) % plain_and_all])
        # The small sizes of a form compile as the large ones do, and in turn all are taken.
        for k, options in enumerate(rows):
            yield align_case(sizes[k % len(sizes)], options)
    # Every program that serves some size of a model.
    direct = [options for options in rows if options["mode"] == "direct"]
    pairs, k = 1, 0
    while pairs <= _MOST_PAIRS:
        size = forms.Size(pairs, _BUCKET_EXPERTS, _BUCKET_BLOCK)
        yield align_case(size, direct[k % len(direct)])
        pairs, k = tables.size_bucket(*size) + 1, k + 1
    for size in forms.BATCHED_SIZES:
        for mode in MODES:
            yield Case(BatchedAlignProblem(*size), mode)


def one_in[T](step: int, things: Iterable[T]) -> Iterator[T]:
    """Of each `step` things one, at another place each time: things often come in pairs and threes."""
    return (thing for i, thing in enumerate(things) if (i + i // step) % step == 0)


def all_cases() -> list[Case]:
    """Each case once, in a fixed order."""
    return list(dict.fromkeys(_all()))
